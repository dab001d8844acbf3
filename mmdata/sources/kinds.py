"""Every kind of source by its name in a recipe, and the union that the recipe's schema shows."""

from __future__ import annotations

from typing import Union

from mmdata.sources.datacomp import DataCompSource
from mmdata.sources.hf import HfSource
from mmdata.sources.images import ImagesSource
from mmdata.sources.img2dataset import Img2datasetSource
from mmdata.sources.parquet import ParquetSource
from mmdata.sources.urls import UrlSource
from mmdata.sources.webdataset import WebDatasetSource

__all__ = ["KINDS", "Source"]

Source = Union[  # noqa: UP007  a name for a union that pydantic reads
    UrlSource, ImagesSource, WebDatasetSource, Img2datasetSource, DataCompSource, ParquetSource, HfSource
]
KINDS: dict[str, type[Source]] = {
    "urls": UrlSource,
    "images": ImagesSource,
    "webdataset": WebDatasetSource,
    "img2dataset": Img2datasetSource,
    "datacomp": DataCompSource,
    "parquet": ParquetSource,
    "hf": HfSource,
}
