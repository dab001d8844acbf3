"""A batch of rows and the decoded pictures behind it.

A pass decodes each picture once, in full, and derives every variant from it; `DecodedCache` keeps both per row until
the chunk of rows is done. Arrays handed out are read-only, so that no stage can change what the next one sees.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.media import image
from mmdata.stage import Pixels

__all__ = ["Batch", "DecodedCache", "pad_rows"]

# (path, offset, size) → the bytes of one media reference
ReadMedia = Callable[[str, int, int], bytes]
# references that will be read next
ExpectMedia = Callable[[Sequence[tuple[str, int, int]]], None]
Picture = npt.NDArray[np.uint8]  # (H, W, 3) RGB, upright, alpha on white, read-only


class DecodedCache:
    """Bytes and pictures of one chunk of rows, each read and decoded once; errors are remembered as well.

    `reads` counts media reads, `decodes` full decodes.
    """

    def __init__(self, table: pa.Table, read: ReadMedia, threads: int = 1, expect: ExpectMedia | None = None) -> None:
        self._references: dict[str, list[Any]] = {
            name: table.column(name).to_pylist() for name in table.column_names if name.startswith("image_")
        }
        self._read = read
        self._expect = expect
        self._threads = threads
        self._bytes: dict[int, bytes] = {}
        self._pictures: dict[int, Picture | Exception] = {}
        self._variants: dict[tuple[int, Pixels], Picture | Exception] = {}
        self.reads = 0
        self.decodes = 0

    def has_media(self, row: int) -> bool:
        """Whether the row refers to an image at all."""
        paths = self._references.get("image_path")
        return paths is not None and paths[row] is not None

    def expect(self, rows: Sequence[int]) -> None:
        """Tell the reader which rows' media is wanted next, so that it can fetch what lies together at once."""
        refs = self._references
        if self._expect is not None:
            wanted = [r for r in rows if r not in self._bytes and self.has_media(r)]
            names = ("image_path", "image_offset", "image_size")
            self._expect([(refs[names[0]][r], refs[names[1]][r], refs[names[2]][r]) for r in wanted])

    def unreadable(self, row: int) -> Exception | None:
        """What reading the row's media raises, or None."""
        try:
            self.data(row)
        except Exception as error:  # noqa: BLE001  foreign filesystems raise anything; here it becomes a value
            return error
        return None

    def data(self, row: int) -> bytes:
        """The stored bytes of the row's image."""
        if row not in self._bytes:
            refs = self._references
            self.reads += 1
            self._bytes[row] = self._read(refs["image_path"][row], refs["image_offset"][row], refs["image_size"][row])
        return self._bytes[row]

    def picture(self, row: int) -> Picture:
        """The row's image in full, (H, W, 3) uint8 RGB; raises what the decoder raised."""
        if row not in self._pictures:
            self.decodes += 1
            self._pictures[row] = _frozen(lambda: image.decode(self.data(row)))
        return _or_raise(self._pictures[row])

    def variant(self, row: int, pixels: Pixels) -> Picture:
        """The row's image as `pixels` asks; raises what the decoder raised."""
        key = (row, pixels)
        if key not in self._variants:
            self._variants[key] = _frozen(lambda: self._derive(row, pixels))
        return _or_raise(self._variants[key])

    def _derive(self, row: int, pixels: Pixels) -> Picture:
        if pixels.size is None:
            return self.picture(row)
        whole = image.decode(self.data(row), min_side=pixels.size) if pixels.scaled else self.picture(row)
        return image.transform(whole, pixels.size, pixels.fit, pixels.resample)

    def fill(self, rows: Sequence[int], pixels: Pixels) -> None:
        """Decode the rows that are not decoded yet, on several threads (decoders release the GIL)."""
        missing = [r for r in rows if (r, pixels) not in self._variants and self.has_media(r)]
        if self._threads > 1 and len(missing) > 1:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(lambda r: self.error(r, pixels), missing))

    def of(self, rows: Sequence[int]) -> DecodedCache:
        """What these rows hold, and nothing of the others."""
        kept = copy.copy(self)
        kept._bytes = {r: v for r, v in self._bytes.items() if r in rows}
        kept._pictures = {r: v for r, v in self._pictures.items() if r in rows}
        kept._variants = {k: v for k, v in self._variants.items() if k[0] in rows}
        return kept

    def error(self, row: int, pixels: Pixels) -> Exception | None:
        """What decoding this variant raises, or None."""
        try:
            self.variant(row, pixels)
        except Exception as error:  # noqa: BLE001  decoders raise anything; here it becomes a value
            return error
        return None


def _frozen(make: Callable[[], Picture]) -> Picture | Exception:
    try:
        picture = make()
    except Exception as error:  # noqa: BLE001  decoders raise anything; here it becomes a value
        return error
    picture.flags.writeable = False
    return picture


def _or_raise(found: Picture | Exception) -> Picture:
    if isinstance(found, Exception):
        raise found
    return found


class Batch:
    """Some rows of one shard, as a stage sees them.

    `table` holds row_id and the columns read; `rows` are their indexes into `cache`.
    """

    def __init__(self, table: pa.Table, cache: DecodedCache | None = None, rows: Sequence[int] | None = None) -> None:
        self.table = table
        self.cache = cache
        self.rows = list(range(len(table))) if rows is None else list(rows)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, column: str) -> list[Any]:
        """The column's values as Python objects, None for NULL."""
        return list(self.table.column(column).to_pylist())

    def column(self, name: str) -> pa.Array:
        """The column as one Arrow array."""
        return self.table.column(name).combine_chunks()

    @property
    def row_ids(self) -> npt.NDArray[np.int64]:
        """(N,) int64."""
        return np.asarray(self.table.column("row_id").to_numpy())

    def data(self) -> list[bytes]:
        """The stored bytes of each image, not decoded."""
        assert self.cache is not None, "this batch has no media"
        return [self.cache.data(r) for r in self.rows]

    def pixels(self, variant: Pixels | None = None) -> Any:
        """The pictures as RGB uint8, read-only.

        With a `size`: one array (N, size, size, 3). Without: a list of N arrays (H, W, 3), as stored.
        """
        assert self.cache is not None, "this batch has no media"
        wanted = variant or Pixels()
        self.cache.fill(self.rows, wanted)
        pictures = [self.cache.variant(r, wanted) for r in self.rows]
        if wanted.size is None:
            return pictures
        if not pictures:
            return np.empty((0, wanted.size, wanted.size, 3), np.uint8)
        stacked = np.stack(pictures)
        stacked.flags.writeable = False
        return stacked

    def take(self, indexes: Sequence[int]) -> Batch:
        """The rows at these positions of the batch, sharing what is decoded."""
        chosen = list(indexes)
        table = self.table.take(pa.array(chosen, pa.int64()))
        return Batch(table, self.cache, [self.rows[i] for i in chosen])

    def apart(self) -> Batch:
        """The same rows with a cache that holds no other rows' pictures, to be kept for long."""
        return Batch(self.table, self.cache and self.cache.of(self.rows), self.rows)


def pad_rows(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """`array` with zero rows appended up to `rows`: a model sees one fixed shape, whatever the batch."""
    if len(array) > rows:
        raise ValueError(f"{len(array)} rows do not fit a batch shape of {rows}")
    padding = np.zeros((rows - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, padding]) if len(padding) else array
