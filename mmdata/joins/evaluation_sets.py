"""What evaluation sets hold, ready to be compared with: hashes of pictures, n-grams of texts, embeddings.

In: named lists (files of hashes or of texts) and the kept rows of datasets. Out: their values with the number of the
item each belongs to, lists first, in the order given, and for such numbers the set and the item there. SourceError for
a list that is not there, is empty or holds other values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.errors import SourceError
from mmdata.joins.hash_lists import phashes
from mmdata.joins.lists import KeyList, open_list
from mmdata.models.shingles import Shingling, shingle
from mmdata.stage import OlderRows, Weights

__all__ = [
    "Items",
    "check_hash_lists",
    "check_text_lists",
    "embeddings_of",
    "hashes_of",
    "ngrams_of",
    "unit_vectors",
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

    def add(texts: pa.Array | pa.ChunkedArray, item: Callable[[Positions], Positions]) -> None:
        found = shingle(texts, how)
        text = np.repeat(np.arange(len(texts)), np.diff(found.offsets))
        grams.append(found.hashes)
        numbers.append(item(text))

    for name, path in lists.items():
        for texts in _texts(name, path):
            add(texts, lambda text, first=end: first + text)  # type: ignore[misc]
            end += len(texts)
        ends.append(end)
    for part in older.parts() if older is not None else ():
        places = part.column("place").to_numpy()
        add(part.column(column), lambda text, places=places: end + places[text])  # type: ignore[misc]
    gram, number = np.concatenate(grams), np.concatenate(numbers).astype(np.int64)
    order = np.lexsort((number, gram))
    gram, number = gram[order], number[order]
    new = np.ones(len(gram), bool)
    new[1:] = gram[1:] != gram[:-1]
    return gram[new], number[new], Items(tuple(lists), np.array(ends, np.int64), older)


def embeddings_of(column: str, older: OlderRows | None) -> tuple[npt.NDArray[np.float32], Positions, Items]:
    """(unit vectors, the number of each one's item, items), of datasets only."""
    found, numbers = [], [np.empty(0, np.int64)]
    for part in older.parts() if older is not None else ():
        vectors, there = unit_vectors(part.column(column))
        found.append(vectors)
        numbers.append(part.column("place").to_numpy()[there])
    width = found[0].shape[1] if found else 1
    vectors = np.concatenate([np.empty((0, width), np.float32), *found])
    return vectors, np.concatenate(numbers), Items((), np.empty(0, np.int64), older)


def unit_vectors(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """(vectors of length 1, float32, of the rows that have one; which those are): NULL and zero have none."""
    array = column.combine_chunks()
    there = array.is_valid().to_numpy(zero_copy_only=False)
    numbers = array.drop_null().flatten().to_numpy(zero_copy_only=False)
    vectors = numbers.reshape(-1, array.type.list_size).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    has_any = np.isfinite(lengths) & (lengths > 0)
    there[np.flatnonzero(there)[~has_any]] = False
    return vectors[has_any] / lengths[has_any, None], there


def _opened(kind: str, name: str, path: str) -> KeyList:
    is_text = kind == "text_lists"
    try:
        return open_list(path, "caption" if is_text else "phash", is_text=is_text)
    except SourceError as error:
        raise SourceError(f"{kind}.{name}: {error}") from None


def _texts(name: str, path: str) -> Iterator[pa.Array]:
    with TemporaryDirectory() as folder:
        yield from _opened("text_lists", name, path).texts(Path(folder))
