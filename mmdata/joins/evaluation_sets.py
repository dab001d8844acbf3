"""What evaluation sets hold, ready to be compared with: hashes of pictures, n-grams of texts, embeddings.

In: named lists (files of hashes or of texts) and the kept rows of datasets. Out: their values with the number of the
item each belongs to, lists first, in the order given, and for such numbers the set and the item there. SourceError for
a list that is not there, is empty or holds other values; RecipeError for a dataset's column of another type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import RecipeError, SourceError
from mmdata.joins.hash_lists import phashes
from mmdata.joins.lists import KeyList, open_list
from mmdata.models.cosines import Rows, unit_rows_of, vectors_of
from mmdata.models.shingles import Shingling, pieces, shingle
from mmdata.stage import OlderRows, Weights

__all__ = [
    "Items",
    "check_hash_lists",
    "check_text_lists",
    "embeddings_of",
    "hashes_of",
    "is_embedding",
    "is_hash",
    "ngrams_of",
    "weights_of",
]

Positions = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Items:
    """Numbers of items: list after list, then the rows of datasets. `ends[i]` is where list i ends."""

    names: tuple[str, ...]
    ends: Positions
    older: OlderRows | None

    def look_up(self, numbers: Positions) -> tuple[list[str], list[str]]:
        """(set, item there) of each: the place in a list, from 1, or the key of a dataset's row."""
        unique, which = np.unique(numbers, return_inverse=True)
        first_place = int(self.ends[-1]) if len(self.ends) else 0
        at = np.searchsorted(self.ends, unique, "right")
        begins = np.concatenate([[0], self.ends])
        listed = at < len(self.names)
        sets = [self.names[a] for a in at[listed].tolist()]
        items = [str(n + 1) for n in (unique[listed] - begins[at[listed]]).tolist()]
        if not listed.all():
            assert self.older is not None
            found = self.older.look_up(unique[~listed] - first_place)
            sets += found.column("dataset").to_pylist()
            items += found.column("key").to_pylist()
        return [sets[w] for w in which.tolist()], [items[w] for w in which.tolist()]


def weights_of(hash_lists: Mapping[str, str], text_lists: Mapping[str, str]) -> tuple[Weights, ...]:
    """The content of every list under its name, for the identity."""
    return tuple(
        Weights(f"{kind}:{name}", f"sha256:{_opened(kind, name, path).fingerprint()}")
        for kind, lists in (("hash_lists", hash_lists), ("text_lists", text_lists))
        for name, path in lists.items()
    )


def check_hash_lists(lists: Mapping[str, str]) -> None:
    """Read every value; SourceError for one that is no hash."""
    hashes_of(lists, "", None)


def check_text_lists(lists: Mapping[str, str]) -> None:
    """SourceError for a list without any text."""
    for name, path in lists.items():
        if not any(texts.null_count < len(texts) for texts in _texts(name, path)):
            raise SourceError(f"text_lists.{name}: {path} is empty: fill it, or leave it out")


def hashes_of(lists: Mapping[str, str], column: str, older: OlderRows | None) -> tuple[Hashes, Positions, Items]:
    """(hashes, the number of each one's item, items); `column` is that of datasets."""
    hashes, numbers, ends, end = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [], 0
    for name, path in lists.items():
        rows = 0
        with TemporaryDirectory() as folder:  # for remote .npy lists, while they are read
            for some, at in phashes(_opened("hash_lists", name, path), Path(folder), f"hash_lists.{name}"):
                hashes.append(np.array(some))
                numbers.append(end + at)
                rows = max(rows, int(at.max(initial=-1)) + 1)
        if not rows:
            raise SourceError(f"hash_lists.{name}: {path} is empty: fill it, or leave it out")
        end += rows
        ends.append(end)
    for part in older.parts() if older is not None else ():
        _require_type(part, column, "64-bit hashes", is_hash)
        values = part.column(column).combine_chunks()
        hashes.append(np.asarray(values.drop_null()).view(np.uint64))
        numbers.append(end + part.column("place").to_numpy()[values.is_valid().to_numpy(zero_copy_only=False)])
    items = Items(tuple(lists), np.array(ends, np.int64), older)
    return np.concatenate(hashes), np.concatenate(numbers).astype(np.int64), items


def ngrams_of(
    lists: Mapping[str, str], column: str, how: Shingling, older: OlderRows | None
) -> tuple[Hashes, Positions, Items]:
    """(n-grams ascending and once, the first item that has each, items)."""
    grams, numbers, ends, end = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [], 0

    def add(texts: pa.Array | pa.ChunkedArray, items: Positions) -> None:
        for start, stop in pieces(texts):
            found = shingle(texts.slice(start, stop - start), how)
            grams.append(found.hashes)
            numbers.append(np.repeat(items[start:stop], np.diff(found.offsets)))

    for name, path in lists.items():
        for texts in _texts(name, path):
            add(texts, end + np.arange(len(texts)))
            end += len(texts)
        ends.append(end)
    for part in older.parts() if older is not None else ():
        _require_type(part, column, "text", pa.types.is_string)
        add(part.column(column), end + part.column("place").to_numpy())
    gram, number = np.concatenate(grams), np.concatenate(numbers).astype(np.int64)
    order = np.lexsort((number, gram))
    gram, number = gram[order], number[order]
    new = np.ones(len(gram), bool)
    new[1:] = gram[1:] != gram[:-1]
    return gram[new], number[new], Items(tuple(lists), np.array(ends, np.int64), older)


def embeddings_of(column: str, width: int, older: OlderRows | None) -> tuple[Rows, Positions, Items]:
    """((M, width) unit rows, the number of each one's item, items), of datasets only."""
    found, numbers = [np.empty((0, width), np.float32)], [np.empty(0, np.int64)]
    for part in older.parts() if older is not None else ():
        _require_type(
            part, column, f"embeddings of {width} numbers", lambda k: is_embedding(k) and k.list_size == width
        )
        unit, there = unit_rows_of(vectors_of(part.column(column)))
        found.append(unit[there])
        numbers.append(part.column("place").to_numpy()[there])
    return np.concatenate(found), np.concatenate(numbers), Items((), np.empty(0, np.int64), older)


def is_hash(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold 64-bit hashes."""
    return kind in (pa.uint64(), pa.int64())


def is_embedding(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold embeddings."""
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type))


def _require_type(part: pa.Table, column: str, what: str, fits: Callable[[pa.DataType], bool]) -> None:
    kind = part.schema.field(column).type
    if not fits(kind):
        raise RecipeError(f"decontaminate: column {column!r} is {kind} in a dataset of `against`, not {what}")


def _opened(kind: str, name: str, path: str) -> KeyList:
    is_text = kind == "text_lists"
    try:
        return open_list(path, "caption" if is_text else "phash", is_text=is_text)
    except SourceError as error:
        raise SourceError(f"{kind}.{name}: {error}") from None


def _texts(name: str, path: str) -> Iterator[pa.Array]:
    with TemporaryDirectory() as folder:
        yield from _opened("text_lists", name, path).texts(Path(folder))
