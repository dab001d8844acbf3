"""`Dataset.to_datasets`: the kept samples as Hugging Face datasets, the pictures read where they are.

In: a dataset, the columns, whether there is a column `image`. Out: a `datasets.Dataset` whose pictures are paths of the
file system `mmdata-media` (see `media_files`), or a stream that reads shard by shard. Nothing of the media is copied.
Sound and video have the library's features Audio and Video; in a stream they are structs of `bytes` and `path`.
RecipeError: a column is not there, or named twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from mmdata.readers.arrow import IMAGE, arrow_samples, expect_media, kept_columns, medium_of, stored_image
from mmdata.readers.forked import leave_garbage_to_parents
from mmdata.readers.media_files import PROTOCOL, MediaFileSystem, media_url
from mmdata.sample_media import with_medium

if TYPE_CHECKING:
    from mmdata.dataset import Dataset

__all__ = ["hugging_face_samples"]

_REFERENCE = ("key", "image_path", "image_offset", "image_size", "image_ext")


def hugging_face_samples(dataset: Dataset, columns: Sequence[str] | None, media: bool, stream: bool) -> Any:
    """See the top of this file."""
    import datasets

    fsspec.register_implementation(PROTOCOL, MediaFileSystem, clobber=True)
    schema = arrow_samples(dataset, columns, False).schema
    features = datasets.Features.from_arrow_schema(schema.remove_metadata())
    if media:
        name = medium_of(dataset)
        # Encoding a stream's sound or video would need its decoder, although the bytes are there already.
        kinds = {"image": datasets.Image} | ({} if stream else {"audio": datasets.Audio, "video": datasets.Video})
        kind = kinds.get(name)
        plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features[name] = plain if kind is None else kind()
    if stream:
        leave_garbage_to_parents()
        # The one list: `datasets` splits it over workers, and may keep no other.
        asked = None if columns is None else tuple(columns)
        arguments = {"shards": dataset.shards(), "dataset": dataset, "columns": asked, "media": media}
        return datasets.IterableDataset.from_generator(_stream, features=features, gen_kwargs=arguments)
    tables = [_shard(dataset, shard, columns, media) for shard in dataset.shards()]
    table = pa.concat_tables(tables) if tables else features.arrow_schema.empty_table()
    return datasets.Dataset(table.cast(features.arrow_schema))


def _shard(dataset: Dataset, shard: int, columns: Sequence[str] | None, media: bool) -> pa.Table:
    table = kept_columns(dataset, shard, columns)
    if not media:
        return table
    url = dataset.store.url
    images = [
        None
        if row["image_path"] is None
        else {"bytes": None, "path": media_url(url, row["image_path"], row["image_offset"], row["image_size"], name)}
        for row in with_medium(dataset.kept(shard, [])).select(list(_REFERENCE)).to_pylist()
        for name in [f"{row['key']}.{row['image_ext']}"]
    ]
    return table.append_column(medium_of(dataset), pa.array(images, IMAGE))


def _stream(shards: list[int], dataset: Dataset, columns: Sequence[str] | None, media: bool) -> Iterator[Any]:
    """Samples of these shards; `datasets` gives each worker some of them."""
    mine, name = dataset.again(), medium_of(dataset)
    for shard in shards:
        table = kept_columns(mine, shard, columns)
        if not media:
            yield from table.to_pylist()
            continue
        references = with_medium(mine.kept(shard, [])).select(list(_REFERENCE))
        expect_media(mine, references)
        for sample, row in zip(table.to_pylist(), references.to_pylist(), strict=True):
            yield {**sample, name: stored_image(mine, row)}
