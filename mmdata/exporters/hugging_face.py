"""A repository for Hugging Face `datasets`: `data/train-00000-of-00012.parquet` …, and a card that declares features.

`load_dataset(<folder>)` reads the card's `configs` (which files are data) and `dataset_info` (features, with the image
as `Image`, rows, bytes); the Parquet files say the same for themselves. Images are held as bytes with a name, as in
`parquet`.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from mmdata.exporters.parquet import ParquetFiles

__all__ = ["HuggingFace"]


class HuggingFace(ParquetFiles):
    """Parquet files in `data/`, with the features of Hugging Face datasets."""

    def files(self, shard: int, shards: int) -> tuple[str, ...]:
        """One, under the name by which the hub knows a split."""
        return (f"data/train-{shard:05d}-of-{shards:05d}.parquet",)

    def _features(self) -> Any:
        """The features of `datasets`: what it infers from the columns, and the image."""
        import datasets

        features = datasets.Features.from_arrow_schema(self.shape.schema)
        if self.shape.with_media:
            name = self.shape.media_name
            kind = {"image": datasets.Image, "audio": datasets.Audio, "video": datasets.Video}.get(name)
            plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
            features = datasets.Features({name: plain if kind is None else kind(), **features})
        return features

    def schema(self) -> pa.Schema:
        """As Parquet, with every feature declared."""
        described = json.dumps({"info": {"features": self._features().to_dict()}})
        return super().schema().with_metadata({"huggingface": described})

    def header(self) -> dict[str, Any]:
        """Which files are data, and the features."""
        return {
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
            "dataset_info": {"config_name": "default", "features": self._features()._to_yaml_list()},
        }

    def opening(self) -> str:
        """By the folder's name, or the repository's."""
        return (
            "```python\nfrom datasets import load_dataset\n"
            'ds = load_dataset("path/to/this/folder", split="train")  # or its name on the hub\n```\n\n'
            "```sql\nSELECT key, caption FROM 'data/*.parquet' LIMIT 5;  -- DuckDB\n```\n"
        )
