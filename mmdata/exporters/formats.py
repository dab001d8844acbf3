"""The formats of an export by name, and what can be proved of an export before a run has made anything to export.

In: the options, the columns the kept rows will have. Fails: MissingExtra for a package, RecipeError for a column that
is not there or holds no boxes, SourceError for a dataset to be mixed in that is not there.
"""

from __future__ import annotations

import os

import pyarrow as pa

from mmdata.errors import RecipeError, SourceError, nearest
from mmdata.exporters.datacomp import DataComp
from mmdata.exporters.energon import Energon
from mmdata.exporters.files import PlainFiles
from mmdata.exporters.hugging_face import HuggingFace
from mmdata.exporters.lance_table import LanceTable
from mmdata.exporters.mds import Mds
from mmdata.exporters.parquet import ParquetFiles
from mmdata.exporters.shape import Format
from mmdata.exporters.webdataset import WebDataset
from mmdata.layout import export_columns
from mmdata.media.boxes import holds_boxes
from mmdata.settings import ExportOptions
from mmdata.store import Store

__all__ = ["FORMATS", "boxes_type", "prove_export"]

FORMATS: dict[str, type[Format]] = {
    "webdataset": WebDataset,
    "parquet": ParquetFiles,
    "datasets": HuggingFace,
    "files": PlainFiles,
    "mds": Mds,
    "lance": LanceTable,
    "energon": Energon,
    "datacomp": DataComp,
}


def prove_export(options: ExportOptions, schema: pa.Schema, dataset: str) -> None:
    """Prove the export of `dataset`, whose kept rows will have `schema`; what only a mixed dataset can say is left."""
    FORMATS[options.format].require()
    own = os.path.realpath(dataset)
    for entry in options.mix:
        if os.path.realpath(entry.dataset) != own and not Store(entry.dataset).exists("dataset.json"):
            raise SourceError(f"export.mix: there is no dataset at {entry.dataset}")
    if not options.mix:
        export_columns(schema, options.columns)
        boxes_type(schema, options.blur)
        _require_whole_numbers(schema, options.repeat)


def _require_whole_numbers(schema: pa.Schema, name: str | None) -> None:
    if name is not None and name not in schema.names:
        raise RecipeError(f"export.repeat: the dataset has no column {name!r}{nearest(name, schema.names)}")
    if name is not None and not pa.types.is_integer(schema.field(name).type):
        kind = schema.field(name).type
        raise RecipeError(f"export.repeat: the column {name!r} is {kind}; expected whole numbers, how often each row")


def boxes_type(schema: pa.Schema, name: str | None) -> pa.DataType | None:
    """The type of the column of boxes; RecipeError when it is not there, or holds no boxes."""
    if name is None:
        return None
    if name not in schema.names:
        raise RecipeError(f"export.blur: the dataset has no column {name!r}{nearest(name, schema.names)}")
    kind = schema.field(name).type
    if not holds_boxes(kind):
        raise RecipeError(
            f"export.blur: the column {name!r} is {kind}; expected a list of boxes, each [left, top, right, bottom] "
            "in px of the stored picture"
        )
    return kind
