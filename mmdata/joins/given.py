"""What a recipe attaches: given tables and arrays, aligned row by row, found by a key.

In: the options of `attach`. Out, for `plan`: the columns' types, a fingerprint of the content, rows where known; for
the run: an index of the keys and the values of any rows, with everything too large for memory in a scratch folder
(tables as an Arrow file, arrays mapped from where they lie). SourceError or RecipeError for what does not fit together:
no such file or column, arrays longer than their keys, a key in several rows.

A **part** is a table with the arrays beside it: `0.parquet` with `0.npz` as DataComp publishes its metadata, or
`embeddings.npy` with the keys that `ids` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa

from mmdata.errors import RecipeError, SourceError, nearest
from mmdata.joins.arrays import ArrayFile, array_names, arrow_type
from mmdata.joins.key_files import array_files, key_batches, key_texts, rows_of
from mmdata.joins.keys import IndexBuilder, JoinColumn, KeyIndex
from mmdata.joins.tables import names_of, parquet_rows, types_of
from mmdata.sources.list_files import ListFile, find_files, fingerprint, reading

__all__ = ["Given", "Part", "open_given"]


@dataclass(frozen=True)
class Part:
    """Row-aligned files; `keys` is the table, or an array of keys; `arrays` follow the order of the array columns."""

    keys: ListFile | ArrayFile
    table: ListFile | None
    arrays: tuple[ArrayFile, ...]
    rows: int | None  # None = a text file, to be read


@dataclass(frozen=True)
class Given:
    """Files as far as `plan` looks: `table` and `arrays` map new column → the column or array it comes from.

    `types`: new column → Arrow type, in the order of the columns.
    """

    on: JoinColumn
    key: str
    where: str
    parts: tuple[Part, ...]
    table: Mapping[str, str]
    arrays: Mapping[str, str]
    types: Mapping[str, pa.DataType]

    def rows(self) -> int:
        """Rows of all parts; text files are read for it."""
        return sum(rows_of(p.keys, self.key) if p.rows is None else p.rows for p in self.parts)

    def fingerprint(self) -> str:
        """64 hex digits over the content of every file in its order; where they lie and their names do not count."""
        files: dict[str, ListFile] = {}
        for part in self.parts:
            for file in (part.keys, part.table, *part.arrays):
                plain = file.file if isinstance(file, ArrayFile) else file
                if plain is not None:
                    files[plain.path] = plain
        return fingerprint([replace(file, name=str(number)) for number, file in enumerate(files.values())])

    def index(self, folder: Path, duplicates: str) -> KeyIndex:
        """Every key with its row; SourceError for a key in several rows, unless `duplicates` is `first`."""
        builder = IndexBuilder(folder)
        for part in self.parts:
            begin = builder.rows
            for keys, valid in key_batches(part.keys, self.on, self.key, folder):
                builder.add(keys, valid)
            for array in part.arrays:
                _require_rows(array, builder.rows - begin)
        made = builder.finish()
        if made.repeated and duplicates == "refuse":
            raise SourceError(
                f"{self.where}: {made.repeated:,} values of {self.key or self.on} stand in more than one row, for "
                f"example {self._key_at(made.example, folder)}; write `duplicates: first` to take the first row of each"
            )
        return made

    def _key_at(self, row: int, folder: Path) -> str:
        """The key in a row, as it is written."""
        for part in self.parts:
            for texts in key_texts(part.keys, self.key, folder):
                if row < len(texts):
                    return repr(str(texts[row]))
                row -= len(texts)
        return ""


# What a recipe names


def open_given(
    path: str,
    on: JoinColumn,
    key: str | None,
    columns: Mapping[str, str],
    ids: str | None,
    format: str,
) -> Given:
    """The files of `path`, and which of them holds each column; SourceError or RecipeError when they do not fit.

    Looked at once per process as long as no file is added, removed or changed: thousands of footers take seconds.
    """
    asked = (path, on, key, tuple(columns.items()), ids, format)
    there = (_stamps(path), _stamps(ids) if ids is not None else ())
    if asked not in _looked_at or _looked_at[asked][0] != there:
        _looked_at[asked] = there, _open(path, on, key, columns, ids, format)
    return _looked_at[asked][1]


_looked_at: dict[Any, tuple[Any, Given]] = {}


def _stamps(path: str) -> Any:
    """Names, sizes and times of change of the files that a path may mean, those beside them too."""
    with reading(path):
        fs, root = fsspec.core.url_to_fs(path)
        if fs.isdir(root):
            found = fs.find(root, detail=True)
        elif any(c in root for c in "*?["):
            found = fs.find(root[: min(root.index(c) for c in "*?[" if c in root)].rpartition("/")[0], detail=True)
        else:
            beside = [str(PurePosixPath(root).with_suffix(s)) for s in (".parquet", ".npz")]
            found = {p: fs.info(p) for p in dict.fromkeys([root, *beside]) if fs.isfile(p)}
    return {p: [i.get(k) for k in ("size", "mtime", "ino", "ETag", "etag", "created")] for p, i in found.items()}


def _open(
    path: str, on: JoinColumn, key: str | None, columns: Mapping[str, str], ids: str | None, format: str
) -> Given:
    arrays = array_files(path)
    if arrays is None:
        if ids is not None:
            raise RecipeError(f"`ids` names the keys of .npy and .npz files; {path} is a table, which has its own")
        return _from_tables(path, on, key or on, columns, find_files(path, format), None)
    if arrays[0].format == "npy" and ids is None:
        raise RecipeError(f"{path} holds only vectors: say with `ids` which file has the key of each row")
    if ids is not None:
        return _with_ids(path, on, key, columns, arrays, ids)
    tables = [_beside(array, ".parquet") for array in arrays]
    if all(t is not None for t in tables):
        return _from_tables(path, on, key or on, columns, [t for t in tables if t is not None], arrays)
    own = [ArrayFile(array, key or on) for array in arrays]
    if (key or on) not in array_names(arrays[0]):
        raise RecipeError(
            f"{arrays[0].path} has no array {key or on!r} of keys, nor a .parquet of its name beside it: say with "
            "`ids` which file has the key of each row"
        )
    parts = [Part(k, None, tuple(ArrayFile(k.file, c) for c in columns.values()), k.header().shape[0]) for k in own]
    return Given(on, key or on, path, tuple(parts), {}, dict(columns), _array_types(parts, list(columns)))


def _from_tables(
    path: str,
    on: JoinColumn,
    key: str,
    columns: Mapping[str, str],
    tables: list[ListFile],
    arrays: list[ListFile] | None,
) -> Given:
    """Tables, with the `.npz` beside each for the columns that the table does not have."""
    there = names_of(tables[0])
    if key not in there:
        hint = nearest(key, there) if len(there) > 1 or there != [""] else "; it has a value a line and no columns"
        raise SourceError(f"{tables[0].path} has no column {key!r} to join on{hint}; name it with `key_column`")
    others = {new: name for new, name in columns.items() if name not in there}
    if others and arrays is None:
        beside = [_beside(table, ".npz") for table in tables]
        if any(b is None for b in beside):
            name = next(iter(others.values()))
            raise SourceError(f"{tables[0].path} has no column {name!r}{nearest(name, there)}")
        arrays = [b for b in beside if b is not None]
    if others and arrays is not None:
        names = array_names(arrays[0])
        for name in others.values():
            if name not in names:
                where = f"{tables[0].path} has no column, and {arrays[0].path} no array {name!r}"
                raise SourceError(f"{where}{nearest(name, [*there, *names])}")
    table = {new: name for new, name in columns.items() if new not in others}
    types = types_of(tables, [key], list(table.values()))
    parts = []
    for number, file in enumerate(tables):
        beside_it = tuple(ArrayFile(arrays[number], name) for name in others.values()) if others and arrays else ()
        parts.append(Part(file, file, beside_it, parquet_rows(file)))
    found = _array_types(parts, list(others)) | {new: types.field(name).type for new, name in table.items()}
    return Given(on, key, path, tuple(parts), table, others, {new: found[new] for new in columns})


def _with_ids(
    path: str, on: JoinColumn, key: str | None, columns: Mapping[str, str], arrays: list[ListFile], ids: str
) -> Given:
    """Arrays, and as many files of keys: text a line, a column of a table, or an array."""
    given = array_files(ids)
    keys: list[ListFile | ArrayFile]
    if given is not None:
        keys = [ArrayFile(f, None if f.format == "npy" else key or on) for f in given]
        column = key or on
    else:
        files = find_files(ids, "auto")
        keys = list(files)
        column = "" if files[0].format == "txt" else key or on
        types_of(files, [column], [])
    if len(keys) != len(arrays):
        raise SourceError(f"{path} has {len(arrays)} files and {ids} {len(keys)}: there must be one of keys for each")
    if arrays[0].format == "npy" and len(columns) != 1:
        raise RecipeError(f"{path} holds one array a file: `columns` gives it one name, not {len(columns)}")
    parts = []
    for k, array in zip(keys, arrays, strict=True):
        members = [None if array.format == "npy" else name for name in columns.values()]
        rows = k.header().shape[0] if isinstance(k, ArrayFile) else parquet_rows(k)
        parts.append(Part(k, None, tuple(ArrayFile(array, m) for m in members), rows))
    return Given(on, column, path, tuple(parts), {}, dict(columns), _array_types(parts, list(columns)))


def _beside(file: ListFile, suffix: str) -> ListFile | None:
    """The file of the same name with another suffix in the same folder."""
    path = str(PurePosixPath(file.path).with_suffix(suffix))
    with reading(path):
        there = file.fs.isfile(path)
    return ListFile(file.fs, path, PurePosixPath(path).name, suffix[1:]) if there else None


def _require_rows(array: ArrayFile, keys: int | None) -> None:
    rows = array.header().shape[:1]
    if keys is not None and rows != (keys,):
        held = f"{rows[0]:,}" if rows else "no"
        raise SourceError(f"{array.where} has {held} rows, but its keys are {keys:,}: they must be equal")


def _array_types(parts: Sequence[Part], names: Sequence[str]) -> dict[str, pa.DataType]:
    """Column → its type, the same in every part."""
    found: dict[str, pa.DataType] = {}
    for part in parts:
        for name, array in zip(names, part.arrays, strict=True):
            _require_rows(array, part.rows)
            kind = arrow_type(array.header(), array.where)
            if found.setdefault(name, kind) != kind:
                raise SourceError(f"{array.where} is {kind}, but {found[name]} in the files before it; make them alike")
    return found
