"""A shard fetched by img2dataset itself (`fetch.backend: img2dataset`), for those who must reproduce what it makes.

In: the rows of a shard and the options it knows. Out: its tar, committed as the shard's media, and base rows made of
its Parquet, in the order of the list: keys as ours, its messages mapped to our statuses. It runs in a process of its
own, in scratch, with its arguments as JSON. It has no allowances per host, no robots.txt, no check of addresses, and no
bound on the size of a body: options that ask for these are refused (`require`) unless they are given up by name.
Fails: RecipeError (options), MissingExtra (it is not installed), RetryableError (its process ended with an error),
StoreError (disk, folder).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmdata.columns import base_schema, row_id
from mmdata.errors import MissingExtra, RecipeError, RetryableError, StoreError
from mmdata.ingest import IngestCounts, counts_of, key_of, uid_of
from mmdata.settings import FetchOptions
from mmdata.sources.adopted import Row
from mmdata.sources.img2dataset import Img2datasetSource
from mmdata.store import Store, shard_name, write_parquet

__all__ = ["WARNING", "fetch_by_img2dataset", "require"]

# Options that it has, by its names
_HONOURED = {
    "image_size": "image_size",
    "resize_mode": "resize_mode",
    "resize_only_if_bigger": "resize_only_if_bigger",
    "upscale_interpolation": "upscale_interpolation",
    "downscale_interpolation": "downscale_interpolation",
    "encode_format": "encode_format",
    "encode_quality": "encode_quality",
    "skip_reencode": "skip_reencode",
    "disable_all_reencoding": "disable_all_reencoding",
    "extract_exif": "extract_exif",
    "min_image_size": "min_image_size",
    "max_image_area": "max_image_area",
    "max_aspect_ratio": "max_aspect_ratio",
    "timeout_s": "timeout",
    "retries": "retries",
    "concurrency": "thread_count",
    "oom_shard_count": "oom_shard_count",
    "disallowed_header_directives": "disallowed_header_directives",
}
# Those that are ours alone and have nothing to do with how it fetches
_APART = {"backend", "layout", "shard_rows", "allow_private", "robots", "tdm", "decode"}
# Protections it has not: each must be given up by name.
_GIVEN_UP: dict[str, Any] = {"allow_private": True, "robots": "ignore", "tdm": "ignore"}
WARNING = (
    "fetch.backend img2dataset: it follows any URL to any address, asks a host as often as it can, and holds bodies of "
    "any size; fetch.per_host, max_bytes, max_pixels and the like have no effect"
)
# Its own processes (a logger, which runs for ever, and one worker) end with it, and it with whoever started it.
_CALL = """
import ctypes, json, os, signal, sys, warnings
warnings.simplefilter("ignore")
from img2dataset import download
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[2]):
        os.killpg(0, signal.SIGKILL)
    download(**json.load(open(sys.argv[1])))
"""
_MESSAGE_CHARS = 500


def require(fetch: FetchOptions) -> None:
    """RecipeError for options that this backend cannot honour; MissingExtra when img2dataset is not installed."""
    if fetch.backend != "img2dataset":
        return
    for name, value in _GIVEN_UP.items():
        if getattr(fetch, name) != value:
            said = json.dumps(value)
            raise RecipeError(f"fetch.backend img2dataset has no {name}: say fetch.{name}: {said} to go without it")
    usual = FetchOptions().model_dump()
    for name, value in fetch.model_dump().items():
        if name not in _HONOURED and name not in _APART and value != usual[name]:
            raise RecipeError(
                f"fetch.backend img2dataset has no {name}: leave fetch.{name} out, or take backend mmdata"
            )
    if importlib.util.find_spec("img2dataset") is None:
        raise MissingExtra(
            "fetch.backend img2dataset needs that package, in an environment of its own, for its pins clash with other "
            "extras: pip install 'mmdata[img2dataset]'"
        )


def fetch_by_img2dataset(
    store: Store, shard: int, table: pa.Table, fetch: FetchOptions, attempt: str, extra: pa.Schema, has_captions: bool
) -> IngestCounts:
    """Have img2dataset fetch the rows of one shard; commits its tar, then `rows/<shard>.g0.parquet`.

    `has_captions`: the list names a column of captions, which makes members `.txt`. As in
    `ingest_shard`, where the rows file exists, its counts are returned and nothing is fetched or changed.
    """
    started = time.perf_counter()
    rows_name = f"rows/{shard_name(shard)}.g0.parquet"
    if store.exists(rows_name):
        return counts_of(store.read_table(rows_name), started)
    tar_name = f"media/{shard_name(shard)}-{attempt}.tar"
    with store.scratch() as folder:
        out = _run(folder, shard, table, fetch, extra, has_captions)
        found = _found(out, tar_name)
        rows = _base_rows(shard, table, fetch, extra, found)
        if any(row["status"] == "ok" for row in found.values()):
            if not store.commit(tar_name, out / f"{shard:0{fetch.oom_shard_count}d}.tar"):
                raise StoreError(f"{tar_name} exists in {store.url} already: attempt {attempt!r} was used twice")
        write_parquet(rows, folder / "rows.parquet")
        if not store.commit(rows_name, folder / "rows.parquet"):
            rows = store.read_table(rows_name)
    return counts_of(rows, started)


def _run(folder: Path, shard: int, table: pa.Table, fetch: FetchOptions, extra: pa.Schema, has_captions: bool) -> Path:
    """Its output folder, with the one shard; numbered as ours, so that keys and `.json` are what they will be."""
    out = folder / "out"
    out.mkdir()
    if shard:
        # It numbers the shards of a list from the last one that has statistics there (incremental_mode extend).
        before: dict[str, Any] = {"count": 1, "successes": 1, "failed_to_download": 0, "failed_to_resize": 0}
        before |= {"duration": 1, "start_time": 0, "end_time": 1, "status_dict": {}}
        (out / f"{shard - 1:0{fetch.oom_shard_count}d}_stats.json").write_text(json.dumps(before))
    wanted = ["url", *(["caption"] if has_captions else []), *extra.names]
    pq.write_table(table.select(wanted), folder / "list.parquet")
    options: dict[str, Any] = {theirs: getattr(fetch, ours) for ours, theirs in _HONOURED.items()}
    options |= {
        "url_list": str(folder / "list.parquet"),
        "input_format": "parquet",
        "output_folder": str(out),
        "output_format": "webdataset",
        "url_col": "url",
        "caption_col": "caption" if has_captions else None,
        "save_additional_columns": extra.names or None,
        "number_sample_per_shard": fetch.shard_rows,
        "processes_count": 1,
        "incremental_mode": "extend",
        "timeout": max(1, math.ceil(fetch.timeout_s)),
        "max_image_area": fetch.max_image_area or math.inf,
        "max_aspect_ratio": fetch.max_aspect_ratio or math.inf,
        "disallowed_header_directives": list(fetch.disallowed_header_directives),
    }
    (folder / "call.json").write_text(json.dumps(options))
    (folder / "call.py").write_text(_CALL)  # a file, because its worker process imports it
    code, words = _call([sys.executable, str(folder / "call.py"), str(folder / "call.json"), str(os.getpid())], folder)
    if code or not (out / f"{shard:0{fetch.oom_shard_count}d}_stats.json").exists():
        raise RetryableError(f"img2dataset ended without a whole shard {shard_name(shard)} (exit {code}): {words}")
    return out


def _call(command: list[str], folder: Path) -> tuple[int, str]:
    """Its exit code, and the end of what it said."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    with (folder / "said").open("xb") as said:
        # A group of its own, so that all of it can be ended at once.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, cwd=folder, process_group=0
        )
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    words = (folder / "said").read_bytes()[-_MESSAGE_CHARS:].decode("utf-8", "replace")
    return code, " ".join(words.split())


def _found(out: Path, tar_name: str) -> dict[str, Row]:
    """Key → the row of its Parquet, as a source of kind img2dataset reads it, with the media in our tar."""
    source = Img2datasetSource(path=str(out))
    [part] = source.shards()
    found = source.read(part, pa.schema([]))
    return {row["key"]: {**row, "image_path": tar_name if row.get("image_path") else None} for row in found.rows}


def _base_rows(shard: int, table: pa.Table, fetch: FetchOptions, extra: pa.Schema, found: dict[str, Row]) -> pa.Table:
    given = table.column("uid").to_pylist() if "uid" in table.column_names else [None] * len(table)
    captions, urls = table.column("caption").to_pylist(), table.column("url").to_pylist()
    rows = []
    for index, (url, caption, own) in enumerate(zip(urls, captions, given, strict=True)):
        key = key_of(shard, index, fetch.shard_rows, fetch.oom_shard_count)
        lost = {"status": "missing_media", "status_detail": "img2dataset lost the row"}
        made = {"attempts": 1, **found.get(key, lost)}
        fixed = {"row_id": row_id(shard, index), "key": key, "url": url, "caption": caption}
        rows.append({**made, **fixed, "uid": own or uid_of("url", url, caption)})
    plain = base_schema()
    made_table = pa.Table.from_pylist(rows, schema=plain)
    schema = base_schema(extra)
    columns = [made_table.column(f.name) if f.name in plain.names else table.column(f.name) for f in schema]
    return pa.table(columns, schema=schema)
