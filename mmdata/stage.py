"""The shapes of operator and what each promises: Stage (1→1, one row), Group (N→N, a set of rows).

A stage is a function of one row, computed over batches; a group is a function of the set of rows that survive to it.
Both add columns and change nothing else. What an operator reads, writes and needs stands in its `Contract`, which must
not import torch: `plan` proves a recipe without any model package installed.
"""

from __future__ import annotations

import hashlib
import inspect
import marshal
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, get_args, get_origin

import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import RecipeError
from mmdata.options import (
    ColumnName,
    DatasetPath,
    FilePath,
    NoOptions,
    Options,
    OrderBy,
    TextColumn,
    column_options,
    dataset_options,
    file_options,
    order_options,
    text_options,
)
from mmdata.row_sets import GroupRows, OlderRows

if TYPE_CHECKING:
    from mmdata.batch import Batch

__all__ = [
    "ColumnName",
    "Columns",
    "Contract",
    "DatasetPath",
    "Failed",
    "FilePath",
    "Group",
    "GroupRows",
    "Lookup",
    "Needs",
    "NoOptions",
    "OlderRows",
    "Operator",
    "Options",
    "OrderBy",
    "Pixels",
    "Stage",
    "TextColumn",
    "Weights",
    "column_options",
    "dataset_options",
    "file_options",
    "order_options",
    "parse_schema",
    "stage",
]

# What `compute` returns: own column name → one value per row; a cell may be `Failed`.
Columns = Mapping[str, "Sequence[Any] | npt.NDArray[Any] | pa.Array | pa.ChunkedArray"]


@dataclass(frozen=True)
class Failed:
    """A cell that says why a row has no value. `kind` is a short word; a transient failure is tried again."""

    kind: str
    transient: bool = False

    @property
    def reason(self) -> str:
        """What the `reason` column of the column file holds: the kind, after `!` when transient."""
        return f"!{self.kind}" if self.transient else self.kind


@dataclass(frozen=True)
class Pixels:
    """One way to see a picture. Every picture is decoded once, in full, and each variant is derived from that.

    `size`: side of the square in px, or None for the picture as stored. `fit`: `center_crop` scales the short side to
    `size` and cuts the middle (open_clip's and torchvision's evaluation transform), `pad` adds white to a centred
    square first, `stretch` ignores the aspect ratio. `resample` filters are Pillow's, with antialiasing.
    `scaled=True` lets JPEG decode at a reduced DCT scale; such a variant is decoded apart, so that it never changes
    what other stages see. `masked` names a column of boxes (left, top, right, bottom in px of the stored picture),
    which the stage reads: they are filled with the colour around them, before anything else. `flipped` mirrors left
    and right.
    """

    size: int | None = None
    fit: Literal["center_crop", "pad", "stretch"] = "center_crop"
    resample: Literal["bicubic", "bilinear", "area"] = "bicubic"
    scaled: bool = False
    flipped: bool = False
    masked: str | None = None

    def __post_init__(self) -> None:
        if self.scaled and self.masked:
            raise ValueError("boxes are in px of the whole picture: a masked variant cannot be decoded at a scale")

    @property
    def document(self) -> dict[str, Any]:
        """What of it enters identities. The column of boxes enters as one that is read, not by its name."""
        found = {k: v for k, v in vars(self).items() if k not in ("flipped", "masked")}
        return {**found, **({"flipped": True} if self.flipped else {}), **({"masked": True} if self.masked else {})}


@dataclass(frozen=True)
class Weights:
    """A weights file an operator loads. `fingerprint` names its content.

    It is `sha256:…`, `commit:…` or `package:name==version`; None = not known until `Stage.resolve_weights` has brought
    the file. `path` is set for a local file: the planner then takes the file's sha256 as the fingerprint. `missing` is
    what the options must still say, for defaults that name no file: the planner refuses them with these words.
    """

    name: str
    fingerprint: str | None = None
    path: str | None = None
    size_bytes: int | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Needs:
    """What a worker must have. `modules` are import names; `extra` is the mmdata extra that brings them."""

    modules: tuple[str, ...] = ()
    extra: str | None = None
    gpu: float = 0.0  # share of one device where there is one; the stage also runs without
    threads: int = 1


@dataclass(frozen=True)
class Contract:
    """What an operator reads, writes and needs, for given options.

    `reads`: column names, and media roles (`image`). `writes`: Arrow schema of its own columns. `pixels`: every
    variant it will ask of the batch. `batch_shape`: rows of one padded model call, None when there is no model.
    `tolerance`: largest difference of a float output between batch shapes or devices; 0 = bit-identical.
    """

    writes: pa.Schema
    reads: tuple[str, ...] = ()
    pixels: tuple[Pixels, ...] = ()
    batch_shape: int | None = None
    precision: str | None = None
    weights: tuple[Weights, ...] = ()
    needs: Needs = field(default_factory=Needs)
    tolerance: float = 0.0


_TYPES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "list<string>": pa.list_(pa.string()),
    "list<float32>": pa.list_(pa.float32()),
    "list<int64>": pa.list_(pa.int64()),
}


def parse_schema(text: str) -> pa.Schema:
    """Arrow schema from `"sharpness: float32, is_blurred: bool"`; ValueError names a type that is not known."""
    fields = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, type_name = (p.strip() for p in part.partition(":"))
        if type_name not in _TYPES or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"cannot read {part!r}: expected 'name: type' with a type of {', '.join(_TYPES)}")
        fields.append(pa.field(name, _TYPES[type_name]))
    return pa.schema(fields)


O = TypeVar("O", bound=Options)  # noqa: E741


class Operator(Generic[O]):
    """What stages and groups share: a name, a version, a label, options, and a contract.

    `version` changes when the values change; it is part of the identity of everything computed. `label` prefixes
    the operator's columns; under `as: x` a column `<label>_y` appears as `x_y` and any other column c as `x_c`.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int | str] = 1
    label: ClassVar[str] = ""
    reads: ClassVar[str | tuple[str, ...]] = ()
    writes: ClassVar[str | pa.Schema] = ""
    pixels: ClassVar[tuple[Pixels, ...]] = ()
    needs: ClassVar[Needs] = Needs()
    options_type: ClassVar[type[Options]] = NoOptions
    # Options that only add columns: whatever they say, the same batch shape, precision and weights are used, so that
    # the other columns hold the same values.
    additions: ClassVar[tuple[str, ...]] = ()
    # Columns that the default options do not make, and the option that asks for each, for messages.
    on_request: ClassVar[tuple[tuple[str, str], ...]] = ()
    origin: ClassVar[str] = ""  # the package that brings it, set when it is loaded by its entry point

    options: O

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in getattr(cls, "__orig_bases__", ()):
            args = get_args(base)
            origin = get_origin(base)
            if origin is not None and isinstance(origin, type) and issubclass(origin, Operator) and args:
                if isinstance(args[0], type) and issubclass(args[0], Options):
                    cls.options_type = args[0]
        if cls.name and not cls.label:
            cls.label = cls.name

    def __init__(self, options: O) -> None:
        self.options = options

    @classmethod
    def contract(cls, options: O) -> Contract:
        """The contract under these options; the default is made of the class attributes."""
        reads = (cls.reads,) if isinstance(cls.reads, str) else tuple(cls.reads)
        writes = parse_schema(cls.writes) if isinstance(cls.writes, str) else cls.writes
        return Contract(writes=writes, reads=reads, pixels=cls.pixels, needs=cls.needs)

    @classmethod
    def check_types(cls, options: O, schema: pa.Schema) -> None:
        """What `plan` asks: RecipeError when a column it reads, by its type in `schema`, is of no use to it.

        By default that is a column of another type than text where an option of type `TextColumn` names it.
        """
        for option, columns in text_options(options).items():
            for column in set(columns) & set(schema.names):  # under some options a column is not read, nor there
                kind = schema.field(column).type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise RecipeError(f"{cls.name}: {option} names column {column!r}, which is {kind}; expected text")


class Stage(Operator[O]):
    """1→1: a function of one row, computed over batches; adds columns.

    The runner never hands `compute` a row whose declared media is missing or does not decode: such a row gets the
    reason `missing_media` or `decode`. An exception from `compute` costs only the rows that cause it.
    """

    batch_shape: int | None = None  # set by the runner before `open`: rows of every model call, padded
    precision: str | None = None

    @classmethod
    def resolve_weights(cls, options: O) -> dict[str, str]:
        """Bring weights whose fingerprint the contract could not give; returns weights name → fingerprint."""
        return {}

    def open(self, device: str) -> None:
        """Load what is needed, once per worker, on `cpu` or `cuda`; run one full padded batch before any row."""

    def compute(self, batch: Batch) -> Columns:
        """Own column name → one value per row of the batch, `Failed` where a row has none."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what `open` took."""


class Group(Operator[O]):
    """N→N: a function of the set of surviving rows; adds columns.

    `compute` sees all rows at once, in the order of the options' `prefer` terms, ties by row_id. A group whose columns
    are too wide for that (embeddings) says `streams` and has `compute_streamed` instead.
    """

    streams: ClassVar[bool] = False
    remark: str = ""  # set while computing: what is worth knowing of the whole set; the run shows it

    def compute(self, rows: pa.Table) -> Columns:
        """`rows` has `row_id` and every column of the contract's `reads`; returns one value per row, same order."""
        raise NotImplementedError

    def compute_against(self, rows: pa.Table, older: OlderRows) -> Columns:
        """As `compute`, where an option of type `DatasetPath` names other datasets: `older` are their kept rows."""
        raise NotImplementedError

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        """One value per row, in row order and not in visit order; `scratch` is an empty folder, removed afterwards."""
        raise NotImplementedError


class Lookup(Operator[O]):
    """1→1 from outside: what given files say of each row, found by a key of the row; adds columns.

    A function of the row's key and the files alone, so it is computed once for all rows of the dataset, whatever
    survives, by the process that drives the run. The contract reads one column, the key, and names the files'
    content by `weights`; what may be wrong with them is a RecipeError or SourceError of `contract` or `open`.
    """

    is_filter: ClassVar[bool] = False  # its only column is boolean: rows where it is not TRUE are dropped

    def open(self, folder: Path) -> None:
        """Read and index the files; `folder` is scratch that outlives this object."""

    def compute(self, keys: pa.ChunkedArray) -> pa.Table:
        """Own columns, then `reason` (NULL, or why the row has none), for keys of so many rows, in their order."""
        raise NotImplementedError

    @classmethod
    def summary(cls, options: O) -> str:
        """What `plan` says of the files: what they are and how many rows they have."""
        return ""

    @classmethod
    def check(cls, options: O, folder: Path) -> None:
        """Raise what `open` would raise, before anything of a run is written."""


def stage(
    reads: str | tuple[str, ...], writes: str, *, pixels: Pixels | None = None, name: str | None = None
) -> Callable[[Callable[[Batch], Columns]], type[Stage[NoOptions]]]:
    """Make a stage of one function: `@stage(reads="image", writes="sharpness: float32")`.

    The function takes a `Batch` and returns its columns (name → one value per row). Its identity holds the sha256 of
    the file it stands in (of its own text in a notebook): edit it and the column is computed anew. A stage that reads
    `image` sees `batch.pixels()`, the pictures as stored, unless `pixels` names another variant. ValueError for
    `writes` that cannot be read, RecipeError for a name that is taken.
    """
    parse_schema(writes)

    def decorate(function: Callable[[Batch], Columns]) -> type[Stage[NoOptions]]:
        from mmdata import registry

        names = (reads,) if isinstance(reads, str) else tuple(reads)
        attributes = {
            "name": name or function.__name__,
            "version": hashlib.sha256(_source_bytes(function)).hexdigest(),
            "reads": names,
            "writes": writes,
            "pixels": (pixels or Pixels(),) if "image" in names else (),
            "compute": lambda self, batch: function(batch),
            "__doc__": function.__doc__,
            "__module__": function.__module__,
        }
        made = type(function.__name__, (Stage,), attributes)
        registry.register(made)
        return made

    return decorate


def _source_bytes(function: Callable[..., Any]) -> bytes:
    """The file the function stands in; in a notebook its text, which says the same in the next session.

    In a console there is neither: its compiled code.
    """
    try:
        return Path(inspect.getfile(function)).read_bytes()
    except (OSError, TypeError):
        pass
    try:
        return inspect.getsource(function).encode()
    except (OSError, TypeError):
        return marshal.dumps(function.__code__)


class _CallableModule(ModuleType):
    """This module under the name `mmdata.stage`, where users expect the decorator: calling it decorates.

    Importing any operator makes Python bind `mmdata.stage` to the module, over the function of the same name.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `stage`."""
        return stage(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
