"""The source `webdataset`: tars of samples as the webdataset library reads them, adopted where they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from mmdata.errors import SourceError, nearest
from mmdata.sources.adopted import Adopted, AdoptingSource, Part, Row, missing_media
from mmdata.sources.list_files import reading
from mmdata.sources.list_rows import converted, inferred_type
from mmdata.sources.places import Place, find_places, fingerprint_of, open_place
from mmdata.sources.plain_columns import check_extra_names
from mmdata.sources.tar_samples import Sample, TarSamples

__all__ = ["WebDatasetSource", "parsed_object", "text_of"]

_TYPED_FROM = 1000  # samples that decide on the types of extra columns
_SUFFIXES = (".tar",)
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4")


class WebDatasetSource(AdoptingSource):
    """Any WebDataset: one tar is one shard, its samples are the rows, in the order of the tar. Nothing is copied.

    Keys are the tars' own; where tars number their samples anew each, keys repeat, and `row_id` tells rows apart. The
    column `path` is `<tar>/<member>` relative to the source, and the uid is made of it unless there is a URL or a uid.
    """

    kind: Literal["webdataset"] = "webdataset"
    path: str = Field(
        min_length=1, description="tar, folder, glob, or braces as in {00000..00041}.tar; fsspec URLs too"
    )
    image: str | None = Field(
        None, description="extensions of the picture, the best first, as in 'jpg;left.png'; null = the first image"
    )
    caption: str | None = Field(
        "txt;caption;json.caption;json.text",
        description="where captions are: extensions, or json.<field>; the first that is there; null = there are none",
    )
    url: str | None = Field("json.url", description="where the URL is, as in caption; null = there is none")
    uid: str | None = Field(None, description="where the sample's own uid is, as in caption; null = made by mmdata")
    columns: tuple[str, ...] = Field((), description="fields of the .json member to carry along")

    @field_validator("image", "caption", "url", "uid")
    @classmethod
    def _is_list(cls, value: str | None) -> str | None:
        if value is not None and not all(part.strip() for part in value.split(";")):
            raise ValueError(f"{value!r} is no list of extensions; expected something such as 'jpg;png'")
        return value

    @property
    def has_captions(self) -> bool:
        """Whether the recipe names a place for captions."""
        return self.caption is not None

    def schema(self) -> pa.Schema:  # type: ignore[override]
        """`path`, then the columns asked for, in the types of the first 1,000 samples (see the source `urls`)."""
        check_extra_names(self.columns)
        places = self._places()
        first: list[dict[str, Any]] = []
        enough = _TYPED_FROM if self.columns else 1
        for place in places:
            samples = self._samples(place, probe=False)
            first += [parsed_object(s.texts.get("json")) for s in islice(samples, enough - len(first))]
            if len(first) >= enough:
                break
        if not first:
            raise SourceError(f"{places[0].url} holds no samples")
        known = {name for sample in first for name in sample}
        for name in self.columns:
            if name not in known:
                raise SourceError(
                    f"no .json of the first {len(first):,} samples of {self.path} has a field {name!r} "
                    f"(source.columns){nearest(name, sorted(known))}"
                )
        types = [(n, inferred_type([sample.get(n) for sample in first], "json")) for n in self.columns]
        return pa.schema([("path", pa.string()), *types])

    def fingerprint(self) -> str:
        """See `AdoptingSource`: the tars' names, sizes and times of change."""
        return fingerprint_of(self._places())

    def parts(self, shard_rows: int) -> Iterator[Part]:
        """One tar each."""
        for place in self._places():
            yield Part((place,), label=place.name)

    def read(self, part: Part, extra: pa.Schema) -> Adopted:
        """One row per sample; one whose image is not there is `missing_media`, also the one in which the tar ends."""
        [place] = part.files
        rows: list[Row] = []
        found: list[dict[str, Any]] = []
        for sample in self._samples(place, probe=True):
            fields = parsed_object(sample.texts.get("json"))
            found.append(fields)
            row = dict(sample.image or missing_media("the sample has no image"))
            location = sample.image_name or sample.key
            row |= {"key": sample.key, "path": f"{place.name}/{location}"}
            for name in ("caption", "url", "uid"):
                row[name] = text_of(getattr(self, name), sample.texts, fields)
            rows.append(row)
        columns = [converted([f.get(t.name) for f in found], t.type) for t in extra if t.name != "path"]
        paths = pa.array([row["path"] for row in rows], pa.string())
        return Adopted(rows, pa.table([paths, *columns], schema=extra))

    def _places(self) -> list[Place]:
        places = find_places(self.path, _SUFFIXES, "tars")
        for place in places:
            if place.name.lower().endswith(_COMPRESSED):
                raise SourceError(
                    f"{place.url} is compressed: media in it cannot be read in place; uncompress it first"
                )
        return places

    def _samples(self, place: Place, probe: bool) -> Iterator[Sample]:
        wanted = None if self.image is None else tuple(p.strip().lower() for p in self.image.split(";"))
        texts = {"json"} if self.columns else set()
        for where in (self.caption, self.url, self.uid):
            texts |= {p.strip().split(".")[0].lower() if _is_json(p) else p.strip().lower() for p in _listed(where)}
        with reading(place.url), open_place(place.url) as file:
            yield from TarSamples(file, place.url, place.size, wanted, tuple(texts), probe)


def _listed(where: str | None) -> list[str]:
    return [] if where is None else [p.strip() for p in where.split(";")]


def _is_json(place: str) -> bool:
    return place.strip().lower().startswith("json.")


def text_of(where: str | None, texts: Mapping[str, bytes], fields: Mapping[str, Any]) -> str | None:
    """The first of these places that holds text: an extension's member, or a field of the .json; None = nowhere."""
    for place in _listed(where):
        if _is_json(place):
            value = fields.get(place[len("json.") :])
            if isinstance(value, str):
                return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        elif place.lower() in texts:
            return texts[place.lower()].decode("utf-8", "replace").removeprefix("\ufeff").rstrip("\r\n")
    return None


def parsed_object(data: bytes | None) -> dict[str, Any]:
    """The JSON object in these bytes; empty where it is none."""
    try:
        found = json.loads(data) if data else None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
