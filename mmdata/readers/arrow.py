"""`Dataset.to_arrow`: the kept samples as Arrow record batches, a shard at a time.

In: a dataset, the columns, whether media comes along. Out: a `pyarrow.RecordBatchReader` in row order. RecipeError: a
column is not there, or named twice. StoreError: a shard has other columns than the first one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from mmdata.columns import base_schema
from mmdata.errors import RecipeError, StoreError
from mmdata.readers.samples import require_columns
from mmdata.sample_media import FEATURES, media_name, with_medium

if TYPE_CHECKING:
    from mmdata.dataset import Dataset

__all__ = ["IMAGE", "arrow_samples", "expect_media", "kept_columns", "medium_of", "stored_image"]

IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_REFERENCE = ("key", "image_path", "image_offset", "image_size", "image_ext")
_BATCH_BYTES = 64 << 20  # of media in one batch; a single larger picture has a batch of its own
_BATCH_ROWS = 10_000


def arrow_samples(dataset: Dataset, columns: Sequence[str] | None, media: bool) -> pa.RecordBatchReader:
    """See the top of this file."""
    if columns is not None:
        require_columns(dataset, columns)
        twice = [name for place, name in enumerate(columns) if name in columns[:place]]
        if twice:
            raise RecipeError(f"columns={list(columns)!r}: {twice[0]!r} is named twice; name each column once")
    shards = dataset.shards()
    schema = kept_columns(dataset, shards[0], columns).schema if shards else base_schema()
    if media:
        name = medium_of(dataset)
        schema = schema.append(pa.field(name, IMAGE))
        if name in FEATURES:
            features = {"info": {"features": {name: {"_type": FEATURES[name]}}}}
            schema = schema.with_metadata({"huggingface": json.dumps(features)})
    return pa.RecordBatchReader.from_batches(schema, _batches(dataset, shards, columns, schema, media))


def medium_of(dataset: Dataset) -> str:
    """What the samples' medium is called, see `sample_media.media_name`."""
    shards = dataset.shards()
    return media_name(dataset.kept(shards[0], []).schema.names) if shards else "image"


def kept_columns(dataset: Dataset, shard: int, columns: Sequence[str] | None) -> pa.Table:
    """The kept rows of a shard with these columns in their order (None = all but embeddings)."""
    table = dataset.kept(shard, None if columns is None else list(columns))
    return table if columns is None else table.select(list(columns))


def _batches(
    dataset: Dataset, shards: Sequence[int], columns: Sequence[str] | None, schema: pa.Schema, media: bool
) -> Iterator[pa.RecordBatch]:
    for shard in shards:
        whole = dataset.kept(shard, None if columns is None else list(columns))
        table = whole if columns is None else whole.select(list(columns))
        wanted = pa.schema(list(schema)[: len(table.column_names)])
        if table.schema.names != wanted.names:
            raise StoreError(f"{dataset.store.url}: shard {shard:05d} has other columns than the first; run the recipe")
        table = table.cast(wanted)
        if not media:
            yield from table.replace_schema_metadata(schema.metadata).to_batches(max_chunksize=_BATCH_ROWS)
            continue
        references = with_medium(whole).select(list(_REFERENCE))
        expect_media(dataset, references)
        for start, stop in _cuts(references):
            images = [stored_image(dataset, row) for row in references.slice(start, stop - start).to_pylist()]
            part = table.slice(start, stop - start).append_column(schema.field(-1), pa.array(images, IMAGE))
            yield from part.replace_schema_metadata(schema.metadata).combine_chunks().to_batches()


def expect_media(dataset: Dataset, references: pa.Table) -> None:
    """Tell the dataset's media reader that these rows are read next, in order."""
    rows = references.select(["image_path", "image_offset", "image_size"]).to_pylist()
    dataset.media.expect(tuple(row.values()) for row in rows if row["image_path"] is not None)


def _cuts(references: pa.Table) -> Iterator[tuple[int, int]]:
    """`[start, stop)` of stretches with at most so many bytes of media."""
    sizes = references["image_size"].fill_null(0).to_numpy()
    start = 0
    while start < len(sizes):
        fits = int(np.searchsorted(np.cumsum(sizes[start:]), _BATCH_BYTES, "right"))
        stop = start + max(1, min(fits, _BATCH_ROWS))
        yield start, stop
        start = stop


def stored_image(dataset: Dataset, row: dict[str, object]) -> dict[str, object] | None:
    """The stored bytes of a row's image and the name an export gives it; None for a row without one."""
    path, offset, size = row["image_path"], row["image_offset"], row["image_size"]
    if path is None:
        return None
    return {"bytes": dataset.read_media(path, offset, size), "path": f"{row['key']}.{row['image_ext']}"}  # type: ignore[arg-type]
