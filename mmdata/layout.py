"""What an export's samples look like: img2dataset's column names, the chosen columns, and what fits in a `.json`.

The names and their order follow img2dataset's Parquet (peers know them); every further column keeps its name.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmdata.columns import BASE_COLUMNS, MEDIA_ROLES, media_reference, role_of
from mmdata.errors import RecipeError, nearest

__all__ = [
    "ExportColumn",
    "Survey",
    "columns_to_ask",
    "export_columns",
    "fits_json",
    "is_embedding",
    "json_value",
    "project",
    "records",
]

_DESCRIBED = {c.name: c for c in [*BASE_COLUMNS, *(r for role in MEDIA_ROLES for r in media_reference(role))]}
# img2dataset's column → ours; None = a constant
_IMG2DATASET: dict[str, str | None] = {
    "key": "key",
    "url": "url",
    "caption": "caption",
    "status": None,
    "error_message": None,
    "width": "width_px",
    "height": "height_px",
    "original_width": "original_width_px",
    "original_height": "original_height_px",
    "exif": "exif",
    "sha256": "sha256",
}
# img2dataset's types where ours are wider: a side in px fits
_THEIR_TYPES = dict.fromkeys(("width", "height", "original_width", "original_height"), pa.int32())
_CONSTANTS: dict[str, tuple[str | None, str]] = {
    "status": ("success", "always success: an export holds kept samples only"),
    "error_message": (None, "always NULL, for readers of img2dataset's layout"),
}


# A sample's key, perhaps in folders (an adopted one); no part begins with a dot, the last has none.
_KEY = r"^([^./\\\x00-\x20][^/\\\x00-\x20]*/)*[^./\\\x00-\x20]+$"


@dataclass(frozen=True)
class ExportColumn:
    """One exported column: `source` is its name in the dataset, None for img2dataset's constants."""

    name: str
    source: str | None
    type: pa.DataType
    unit: str
    meaning: str


def export_columns(
    schema: pa.Schema,
    chosen: Sequence[str] | None,
    meanings: Mapping[str, str] | None = None,
    reserved: Sequence[str] = (),
) -> tuple[ExportColumn, ...]:
    """The columns of an export: img2dataset's, then the chosen ones in the order given.

    `schema` is that of the dataset's kept rows; `reserved` are names the format takes for itself. `chosen` None = uid,
    the source's extra columns and all step columns but their reasons and embeddings. A column whose name differs at
    most in case from one of img2dataset's or of `reserved`, which the source list may well have, is exported as
    `source_<name>`.
    RecipeError for a column that is not there, with the nearest name.
    """
    found = [
        ExportColumn(name, source, _THEIR_TYPES.get(name, pa.string()), *_about(name, source))
        for name, source in _IMG2DATASET.items()
    ]
    mapped = {c.source for c in found}
    if chosen is None:
        hidden = (_DESCRIBED.keys() | {"verdict", "step", "step_name", "reason"}) - {"uid"}
        chosen = [
            n
            for n in schema.names
            if n not in hidden and not n.endswith("_reason") and not is_embedding(schema.field(n).type)
        ]
    taken = {c.name for c in found} | set(reserved)
    for name in dict.fromkeys(chosen):
        if name in mapped or (name in _IMG2DATASET and name not in schema.names):
            continue  # exported already, under img2dataset's name
        if name not in schema.names:
            raise RecipeError(f"export.columns: the dataset has no column {name!r}{nearest(name, schema.names)}")
        exported = f"source_{name}" if name.lower() in taken else name
        if exported.lower() in taken:
            raise RecipeError(f"export.columns: {name!r} collides with another exported column; leave it out")
        taken.add(exported.lower())
        meaning = (meanings or {}).get(name, "as given in the source")
        about = _about(exported, name) if name in _DESCRIBED else ("", meaning)
        found.append(ExportColumn(exported, name, schema.field(name).type, *about))
    return tuple(found)


def _about(name: str, source: str | None) -> tuple[str, str]:
    if source is None:
        return "", _CONSTANTS[name][1]
    column = _DESCRIBED[source]
    return column.unit, column.meaning


def columns_to_ask(chosen: Sequence[str] | None) -> list[str] | None:
    """What to ask of the dataset beside its base rows: the chosen columns that are not among them; None = all."""
    return None if chosen is None else [n for n in chosen if n not in _DESCRIBED and n not in _IMG2DATASET]


def is_embedding(kind: pa.DataType) -> bool:
    """Whether values of this type are vectors for machines, exported only when they are named and never as JSON."""
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_float16(kind.value_type))


def project(table: pa.Table, columns: Iterable[ExportColumn]) -> pa.Table:
    """Kept rows as exported: same rows and order, the export's columns and names; NULL in a column they do not have."""
    arrays, fields = [], []
    for column in columns:
        if column.source is None:
            arrays.append(pa.array([_CONSTANTS[column.name][0]] * len(table), column.type))
        elif column.source not in table.column_names:  # another dataset of a mix has it
            arrays.append(pa.nulls(len(table), column.type))
        else:
            arrays.append(table.column(column.source).cast(column.type))
        fields.append(pa.field(column.name, column.type))
    return pa.table(arrays, schema=pa.schema(fields))


def fits_json(values: pa.ChunkedArray | pa.Array) -> bool:
    """Whether every reader infers one type from any row of this column written as JSON.

    Not so for NULLs, empty lists (no element type), NaN and infinities (no JSON), uint64 (beyond int64 for some rows
    only) and types JSON has not. Readers such as Hugging Face datasets infer types from the first rows and stop at a
    later row that differs.
    """
    kind = values.type
    if values.null_count:
        return False
    if pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    if pa.types.is_integer(kind):
        return bool(kind != pa.uint64())
    if kind in (pa.float32(), pa.float64()):
        return pc.all(pc.is_finite(values)).as_py() is not False
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        shortest = pc.min(pc.list_value_length(values)).as_py()
        return shortest != 0 and fits_json(pc.list_flatten(values))
    if pa.types.is_struct(kind):
        return all(fits_json(pc.struct_field(values, [i])) for i in range(kind.num_fields))
    return False


class Survey:
    """The first look at all kept rows, without media: what decides names and columns for the whole export.

    `rows`, `media_bytes`, `value_bytes` (about what the values take in memory); `extensions`: image extension → rows
    (`None`: rows without an image); `has_captions`;
    `json_columns()`; `full_columns()`; `digest()`: sha256 over every exported value and the size of each image.
    """

    def __init__(self, columns: Sequence[ExportColumn]) -> None:
        self.columns = tuple(columns)
        self.rows = 0
        self.media_bytes = 0
        self.value_bytes = 0
        self.extensions: Counter[str | None] = Counter()
        self.has_captions = False
        self._fits = {c.name for c in columns}
        self._full = {c.name for c in columns}
        self._hash = hashlib.sha256()

    def add(self, shard: int, kept: pa.Table, as_members: bool, also: Sequence[str] = ()) -> None:
        """Take in the kept rows of one shard; `as_members`: RecipeError for a key that cannot name a member of a tar.

        `also`: columns that are not exported and yet decide what is.
        """
        table = project(kept, self.columns)
        self.rows += len(table)
        self.media_bytes += pc.sum(kept.column("image_size")).as_py() or 0
        self.extensions.update(_extension(e) for e in kept.column("image_ext").to_pylist())
        self.has_captions |= kept.column("caption").null_count < len(table)
        self._fits = {n for n in self._fits if fits_json(table.column(n))}
        self._full = {n for n in self._full if not table.column(n).null_count}
        if as_members:
            _check_keys(shard, table.column("key"))
        decides = pa.table(
            [*table.columns, *(kept.column(n) for n in ("image_size", *also))],
            names=[*table.column_names, *(f"place:{n}" for n in ("image_size", *also))],
        )
        self.value_bytes += table.nbytes
        self._hash.update(_content_hash(decides))

    def json_columns(self, with_nulls: bool) -> tuple[str, ...]:
        """Names that go into each sample's `.json`; `with_nulls`: all but embeddings, whatever they hold."""
        return tuple(c.name for c in self.columns if c.name in self._fits or (with_nulls and not is_embedding(c.type)))

    def full_columns(self) -> tuple[str, ...]:
        """Names of the columns without a NULL."""
        return tuple(c.name for c in self.columns if c.name in self._full)

    def digest(self) -> str:
        """Hex sha256 of what was added, in order."""
        return self._hash.hexdigest()

    def image_extension(self) -> str | None:
        """The one extension of every image: theirs where they share one, else `jpg`; None when no row has an image.

        Samples of a tar must have the same members. Readers look at the bytes, so a PNG called `.jpg` opens. Of sound
        and video it is the most frequent one, and `bin` where there are pictures among them.
        """
        kinds = [e for e in self.extensions if e is not None]
        if not kinds:
            return None
        if len(kinds) == 1:
            return kinds[0]
        roles = {role_of("any", e) for e in kinds}
        if "image" in roles:
            return "jpg" if roles == {"image"} else "bin"
        return max(sorted(kinds), key=lambda e: self.extensions[e])


def _extension(ext: str | None) -> str | None:
    return "jpg" if ext == "jpeg" else ext


def _check_keys(shard: int, keys: pa.ChunkedArray) -> None:
    named = pc.and_(pc.match_substring_regex(keys, _KEY), pc.less_equal(pc.binary_length(keys), 90))
    if keys.null_count or pc.all(named).as_py() is False:
        bad = [k for k, is_good in zip(keys.to_pylist(), named.to_pylist(), strict=True) if not is_good][:1]
        raise RecipeError(
            f"export: shard {shard:05d} has a sample whose key {bad[0]!r} cannot name a file in a tar; expected 1 to "
            "90 bytes, with no dots but in folders' names, and no spaces; set export.format to parquet"
        )


def _content_hash(table: pa.Table) -> bytes:
    """Sha256 of the values and types, whatever chunks and buffers they happen to lie in (so through Parquet)."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), sink, compression="none", row_group_size=max(1, len(table)))
    return hashlib.sha256(sink.getvalue()).digest()


def records(table: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a row, of the columns named, in that order."""
    rows: list[dict[str, Any]] = table.select(list(names)).to_pylist()
    return rows


def json_value(value: Any) -> Any:
    """What JSON can hold: bytes as hex digits, NaN and infinities as null, times as text."""
    if isinstance(value, dict):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Decimal):  # also DuckDB's HUGEINT, which sum() gives
        return int(value) if value == value.to_integral_value() else float(value)
    return value.hex() if isinstance(value, bytes) else str(value)
