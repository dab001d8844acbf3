"""What a recipe may say about reading and writing the outside: the options of fetch and of export."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from mmdata.stage import Options

__all__ = ["ExportOptions", "FetchOptions", "HostLimit", "Interpolation", "MixOptions", "RecipeName", "parse_size"]

DEFAULT_SHARD_ROWS = 10_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{p}IB": 1 << (10 * i) for i, p in enumerate("KMGT", 1)
}


def parse_size(text: str | int) -> int:
    """Bytes from `1GB` (10^9), `512MiB` (2^20) or a plain number; ValueError when it is neither, or zero."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"cannot read the size {text!r}; expected a number and a unit, such as 1GB or 512MiB")
    size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ValueError(f"the size {text!r} is not above zero")
    return size


def _plain_name(name: str) -> str:
    if "#" in name or any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name):
        raise ValueError("it names the selection, as in DATASET#NAME: expected one line of text without '#'")
    return name


RecipeName = Annotated[str, AfterValidator(_plain_name)]  # selections are called like their recipes
Interpolation = Literal["nearest", "linear", "bilinear", "cubic", "bicubic", "area", "lanczos", "lanczos4"]


class HostLimit(Options):
    """What one host allows; null = no bound."""

    connections: int | None = Field(4, ge=1, description="connections at once")
    per_s: float | None = Field(10.0, gt=0, allow_inf_nan=False, description="requests/s")


class FetchOptions(Options):
    """How a list's media is fetched, checked and stored; names and meanings are img2dataset's where it has them.

    `OPERATIONAL` names the options that change how fast and how patiently rows are fetched, never what is stored for
    a row that succeeds.
    """

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset(
        "timeout_s retries concurrency bytes_in_flight user_agent decode_threads min_bytes_per_s contact per_host "
        "per_host_rate host_limits host_failures host_cooldown_s defer_after_s resolve skip_existing".split()
    )

    media: Literal["image", "audio", "video", "any"] = Field(
        "image", description="image: checked and resized; audio, video, any: bytes stored as fetched, once told by them"
    )
    store: Literal["resized", "original", "both"] = Field(
        "resized", description="original: bytes as fetched, once they are proved to decode; both: side by side"
    )
    image_size: int = Field(256, ge=1, le=16_384, description="side in px that resize_mode brings the picture to")
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = Field(
        "keep_ratio", description="keep_ratio: short side; keep_ratio_largest: long side; border: and pad to a square"
    )
    resize_only_if_bigger: bool = Field(False, description="leave pictures whose side is not above image_size")
    upscale_interpolation: Interpolation = Field("lanczos", description="OpenCV's filter for enlarging")
    downscale_interpolation: Interpolation = Field("area", description="OpenCV's filter for shrinking")
    encode_format: Literal["jpg", "png", "webp"] = Field("jpg", description="format of stored pictures")
    encode_quality: int = Field(95, ge=0, le=100, description="jpg, webp: 0 to 100; png: zlib level 0 to 9, else 6")
    skip_reencode: bool = Field(False, description="keep the bytes of a picture that needs no change at all")
    disable_all_reencoding: bool = Field(False, description="store bytes as fetched, once they are proved to decode")
    decode: Literal["exact", "fast"] = Field(
        "fast", description="fast: JPEG at a DCT scale of at least 1.5 times the target before it is shrunk"
    )
    animated: Literal["first", "error"] = Field("first", description="of an animation: its first frame, or refused")
    compute_hash: Literal["md5", "sha512"] | None = Field(None, description="a further hash column beside sha256")
    verify_hash: tuple[str, Literal["sha256", "md5", "sha512"]] | None = Field(
        None, description="column of the list with each body's hash in hex, and its kind; others are hash_mismatch"
    )
    bbox: str | None = Field(
        None, description="column of the list with boxes to blur: [left, top, right, bottom] in 0 to 1"
    )
    extract_exif: bool = Field(True, description="keep EXIF tags as JSON in the column exif")
    min_image_size: int = Field(0, ge=0, description="px: a shorter short side is filtered")
    max_image_area: float | None = Field(None, gt=0, description="px: a larger area is filtered; null = no bound")
    max_aspect_ratio: float | None = Field(None, ge=1, description="long by short side: above is filtered")
    max_pixels: int = Field(2**26, ge=1, le=2**29 // 3, description="px in the header: above is never decoded")
    timeout_s: float = Field(20.0, gt=0, description="deadline of one URL: all attempts, redirects and the body")
    retries: int = Field(0, ge=0, le=20, description="further attempts after connection trouble, 429 and 5xx")
    max_bytes: int = Field(64 << 20, ge=1, description="bytes of one body")
    max_redirects: int = Field(5, ge=0, le=50, description="redirects followed, each one's address checked")
    allow_private: bool = Field(False, description="let URLs lead to private, loopback and link-local addresses")
    min_bytes_per_s: int = Field(1000, ge=0, description="a body that comes more slowly than this for 5 s is given up")
    max_header_bytes: int = Field(64 << 10, ge=1024, description="bytes of an answer's headers")
    contact: str | None = Field(
        None,
        pattern=r"^[\x21-\x7e]+$",
        description="page or mail address of who fetches, for servers' owners: part of the default User-Agent",
    )
    user_agent: str | None = Field(
        None, pattern=r"^[\x20-\x7e]+$", description="User-Agent header; null = mmdata/<version> (+<contact>)"
    )
    robots: Literal["respect", "ignore"] = Field("respect", description="robots.txt of every host, by our User-Agent")
    disallowed_header_directives: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex", "noml"),
        description="directives of X-Robots-Tag by which a row is opted_out; [] = none",
    )
    tdm: Literal["respect", "ignore"] = Field("respect", description="the header TDM-Reservation: 1 opts a row out")
    concurrency: int = Field(256, ge=1, le=10_000, description="most URLs in flight in one worker; it adapts below")
    per_host: int = Field(4, ge=1, description="connections to one host at once, over all workers of a run")
    per_host_rate: float | None = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="requests/s to one host, over all workers of a run; null = no bound",
    )
    host_limits: dict[str, HostLimit] = Field({}, description="other allowances for some hosts, by host name")
    host_failures: int = Field(10, ge=1, description="failures in a row after which a host is left alone for a while")
    host_cooldown_s: float = Field(60.0, gt=0, description="s that it is left alone, doubled each time, at most 1 h")
    defer_after_s: float | None = Field(
        None,
        ge=0,
        description="s that a shard waits for hosts that answer, but slowly allow, once all others are done; "
        "then their rows are deferred; null = as long as it takes",
    )
    resolve: dict[str, str] = Field({}, description="host name, or *.suffix → IP address, instead of DNS")
    bytes_in_flight: int = Field(64 << 20, ge=1 << 20, description="bytes of bodies in memory at once in one worker")
    decode_threads: int | None = Field(
        None, ge=1, description="threads that decode and encode; null = this worker's CPUs"
    )
    skip_existing: tuple[str, ...] = Field(
        (), description="datasets whose URLs and bodies (by sha256) are not fetched or stored again: rows are filtered"
    )
    backend: Literal["mmdata", "img2dataset"] = Field(
        "mmdata", description="img2dataset: fetch and resize by that package, for who must reproduce it"
    )
    layout: Literal["none", "webdataset", "files", "parquet"] = Field(
        "none", description="also lay every shard out as img2dataset does, at the top of the dataset folder"
    )
    oom_shard_count: int = Field(5, ge=1, le=9, description="digits of the shard number in keys and file names")
    shard_rows: int = Field(10_000, ge=1, le=1 << 24, description="input rows of one shard")

    @property
    def given(self) -> dict[str, str]:
        """What the list says of how to treat a row: column of a shard's table (see `sources.urls`) → of the list."""
        columns = {"fetch:hash": self.verify_hash[0] if self.verify_hash else None, "fetch:boxes": self.bbox}
        return {name: column for name, column in columns.items() if column is not None}

    @field_validator("resolve")
    @classmethod
    def _addresses(cls, resolve: dict[str, str]) -> dict[str, str]:
        for name, address in resolve.items():
            try:
                ipaddress.ip_address(address)
            except ValueError:
                raise ValueError(f"{name} is to be {address!r}: expected an IP address, such as 192.0.2.1") from None
        return resolve

    @model_validator(mode="before")
    @classmethod
    def _default_level(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("encode_format") == "png" and "encode_quality" not in data:
            return {**data, "encode_quality": 6}
        return data

    @model_validator(mode="after")
    def _level_fits(self) -> FetchOptions:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError(f"encode_quality is {self.encode_quality}; for png it is a zlib level, 0 to 9")
        if self.bbox is not None and (self.store != "resized" or self.disable_all_reencoding or self.media != "image"):
            raise ValueError("bbox blurs what is stored, so bytes as fetched cannot be stored, nor sound and film")
        return self


class MixOptions(Options):
    """One dataset of several that an export mixes."""

    dataset: str = Field(min_length=1, description="dataset folder")
    weight: float = Field(gt=0, allow_inf_nan=False, description="share of the samples, by the side of the others'")
    selection: str | None = Field(None, description="recipe name of one of its selections; null = its latest")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]{1,32}$", description="stands before its keys; default: the name of its folder"
    )


Format = Literal["webdataset", "parquet", "datasets", "files", "mds", "lance", "energon", "datacomp"]


class ExportOptions(Options):
    """What to write, and where.

    `OPERATIONAL` names the options that change where and how fast an export is written, never what is in it.
    """

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset(["path", "workers", "push_to_hub"])

    format: Format = Field(
        "webdataset",
        description="webdataset: img2dataset's tars; parquet; datasets: a Hugging Face repository; files: plain files; "
        "mds: MosaicML streaming; lance; energon: tars for Megatron Energon; datacomp: a subset file of uids",
    )
    path: str = Field(min_length=1, description="folder to write, relative to the current directory")
    shard_size: str | int | None = Field(
        None,
        description="largest shard, such as 1GB or 512MiB, in bytes of the tar (other formats: uncompressed); "
        "mds: 64MB where nothing is said",
    )
    shard_rows: int | None = Field(
        None, ge=1, description="most samples of a shard; 10,000 when shard_size is not given either"
    )
    columns: tuple[str, ...] | None = Field(
        None, description="columns beside img2dataset's own; default: the source's extra columns and every step's"
    )
    json_nulls: bool = Field(
        False, description="write columns that hold NULLs into the .json too, as img2dataset does; some readers fail"
    )
    include_media: bool = Field(True, description="hold the images (parquet, datasets, lance, mds, files); false: no")
    row_group_bytes: str | int = Field("64MB", description="parquet, datasets: largest row group, uncompressed")
    shuffle: Literal["none", "buffer", "full"] = Field(
        "none",
        description="none: order of the dataset; buffer: its shards in random order, rows at random among 16 "
        "neighbours; full: all rows at random",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="of shuffle, and of what mix repeats or leaves out")
    blur: str | None = Field(
        None, description="column of boxes [left, top, right, bottom] in px of the stored picture, to be blurred"
    )
    repeat: str | None = Field(
        None, description="column of whole numbers, 0 to 100: how often a kept row is written; see the step sample"
    )
    mix: tuple[MixOptions, ...] = Field(
        (), description="datasets to mix with this one; it takes the share left to 1, unless it is named here too"
    )
    samples: int | None = Field(None, ge=1, description="mix: samples in all")
    epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="mix: samples in all, as a multiple of all rows; default 1"
    )
    workers: int = Field(1, ge=1, le=256, description="shards written at once")
    push_to_hub: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="datasets: repository, such as me/pets, to upload to when the folder is whole; token: HF_TOKEN",
    )

    @model_validator(mode="after")
    def _belongs_together(self) -> ExportOptions:
        if not self.mix and (self.samples is not None or self.epochs is not None):
            raise ValueError("samples and epochs belong to mix, which is not given")
        if self.samples is not None and self.epochs is not None:
            raise ValueError("samples and epochs both say how many samples a mix has; give one of them")
        if self.repeat is not None and (self.mix or self.format == "datacomp"):
            why = "mix says how often a row comes" if self.mix else "a subset file holds each uid once"
            raise ValueError(f"leave repeat out: {why}")
        if self.push_to_hub is not None and self.format != "datasets":
            raise ValueError(f"push_to_hub needs format datasets, not {self.format}")
        return self

    @field_validator("shard_size", "row_group_bytes")
    @classmethod
    def _is_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            parse_size(value)
        return value

    @property
    def max_bytes(self) -> int | None:
        """`shard_size` in bytes; None = no bound."""
        return None if self.shard_size is None else parse_size(self.shard_size)

    @property
    def max_rows(self) -> int | None:
        """Most samples of a shard; None = no bound."""
        return self.shard_rows or (DEFAULT_SHARD_ROWS if self.shard_size is None else None)

    @property
    def max_group_bytes(self) -> int:
        """`row_group_bytes` in bytes."""
        return parse_size(self.row_group_bytes)
