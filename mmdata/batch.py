"""A batch of rows and the decoded pictures behind it.

A pass decodes each picture once, in full, and derives every variant from it; `DecodedCache` keeps both per row until
the chunk of rows is done. Arrays handed out are read-only, so that no stage can change what the next one sees.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmdata.media import image
from mmdata.media.blur import Box, boxes_of
from mmdata.media.masking import mask_boxes
from mmdata.stage import Pixels

__all__ = ["BadBoxes", "Batch", "DecodedCache", "keeps_whole", "pad_rows"]

# (path, offset, size) → the bytes of one media reference
ReadMedia = Callable[[str, int, int], bytes]
# references that will be read next
ExpectMedia = Callable[[Sequence[tuple[str, int, int]]], None]
Picture = npt.NDArray[np.uint8]  # (H, W, 3) RGB, upright, alpha on white, read-only


class BadBoxes(ValueError):
    """A cell of a column of boxes that holds none: see `boxes_of`."""


class DecodedCache:
    """Bytes and pictures of one chunk of rows, each read and decoded once; errors are remembered as well.

    `variants` are those that will be asked for, where that is known. If each can be made of the picture alone, all are
    made when it is decoded, and the picture in full is not kept; else it is kept and each is made when asked for.
    `reads` counts media reads, `decodes` full decodes. One thread asks; what `begin` started runs on others.
    """

    def __init__(
        self,
        table: pa.Table,
        read: ReadMedia,
        threads: int = 1,
        expect: ExpectMedia | None = None,
        variants: Collection[Pixels] = (),
    ) -> None:
        self._references: dict[str, list[Any]] = {
            name: table.column(name).to_pylist() for name in table.column_names if name.startswith("image_")
        }
        self._read = read
        self._expect = expect
        self._threads = threads
        self._at_once = () if keeps_whole(variants) else tuple(variants)
        self._bytes: dict[int, bytes] = {}
        self._pictures: dict[int, Picture | Exception] = {}
        self._variants: dict[tuple[int, Pixels], Picture | Exception] = {}
        self._boxes: dict[tuple[int, str], Any] = {}
        self._pending: dict[int, Future[None]] = {}
        self._counting = threading.Lock()
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
            wanted = [r for r in rows if r not in self._bytes and r not in self._pending and self.has_media(r)]
            names = ("image_path", "image_offset", "image_size")
            self._expect([(refs[names[0]][r], refs[names[1]][r], refs[names[2]][r]) for r in wanted])

    def know_boxes(self, column: str, rows: Sequence[int], cells: Sequence[Any]) -> None:
        """What the column of boxes says of these rows: to be told before a masked variant of them is asked for."""
        self._boxes.update({(r, column): cell for r, cell in zip(rows, cells, strict=True)})

    def lacks(self, row: int, variants: Sequence[Pixels]) -> bool:
        """Whether there is something to make for the row that nobody has begun."""
        return (
            row not in self._pending and self.has_media(row) and any((row, p) not in self._variants for p in variants)
        )

    def begin(self, pool: ThreadPoolExecutor, row: int, variants: Sequence[Pixels]) -> Future[None]:
        """Start making these variants on another thread, which must be called only where they are lacking."""
        self._pending[row] = started = pool.submit(self._make, row, variants)
        return started

    def _make(self, row: int, variants: Sequence[Pixels]) -> None:
        for pixels in variants:
            self._error(row, pixels)

    def _settle(self, row: int) -> None:
        """Wait for what another thread is doing for the row; what was called off is done by who asks."""
        started = self._pending.pop(row, None)
        if started is not None and not started.cancelled():
            started.result()

    def unreadable(self, row: int) -> Exception | None:
        """What reading the row's media raises, or None."""
        try:
            self.data(row)
        except Exception as error:  # noqa: BLE001  foreign filesystems raise anything; here it becomes a value
            return error
        return None

    def data(self, row: int) -> bytes:
        """The stored bytes of the row's image."""
        self._settle(row)
        return self._data(row)

    def _data(self, row: int) -> bytes:
        if row not in self._bytes:
            refs = self._references
            with self._counting:
                self.reads += 1
            self._bytes[row] = self._read(refs["image_path"][row], refs["image_offset"][row], refs["image_size"][row])
        return self._bytes[row]

    def picture(self, row: int) -> Picture:
        """The row's image in full, (H, W, 3) uint8 RGB; raises what the decoder raised."""
        self._settle(row)
        return self._picture(row)

    def _picture(self, row: int) -> Picture:
        if row not in self._pictures:
            with self._counting:
                self.decodes += 1
            self._pictures[row] = _frozen(lambda: image.decode(self._data(row)))
        return _or_raise(self._pictures[row])

    def variant(self, row: int, pixels: Pixels) -> Picture:
        """The row's image as `pixels` asks; raises what the decoder raised."""
        self._settle(row)
        return self._variant(row, pixels)

    def _variant(self, row: int, pixels: Pixels) -> Picture:
        if (row, pixels) not in self._variants:
            together = self._at_once if pixels in self._at_once else (pixels,)
            for each in together:
                self._variants[row, each] = _frozen(partial(self._derive, row, each))
            if self._at_once:
                self._pictures.pop(row, None)
        return _or_raise(self._variants[row, pixels])

    def _derive(self, row: int, pixels: Pixels) -> Picture:
        if pixels.scaled and pixels.size is not None:
            whole = image.decode(self._data(row), min_side=pixels.size)
        else:
            whole = self._picture(row)
        if pixels.masked is not None:
            whole = mask_boxes(whole, self._boxes_in(row, pixels.masked))
        if pixels.flipped:
            whole = np.ascontiguousarray(whole[:, ::-1])
        return whole if pixels.size is None else image.transform(whole, pixels.size, pixels.fit, pixels.resample)

    def _boxes_in(self, row: int, column: str) -> list[Box]:
        try:
            return boxes_of(self._boxes[row, column])
        except ValueError as error:
            raise BadBoxes(f"{column}: {error}") from None

    def fill(self, rows: Sequence[int], pixels: Pixels) -> None:
        """Decode the rows that are not decoded yet, on several threads (decoders release the GIL)."""
        for row in rows:
            self._settle(row)
        missing = [r for r in rows if (r, pixels) not in self._variants and self.has_media(r)]
        if self._threads > 1 and len(missing) > 1:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(lambda r: self._error(r, pixels), missing))

    def of(self, rows: Sequence[int]) -> DecodedCache:
        """What these rows hold, and nothing of the others."""
        for row in rows:
            self._settle(row)
        kept = copy.copy(self)
        kept._pending = {}
        kept._bytes = {r: self._bytes[r] for r in rows if r in self._bytes}
        kept._pictures = {r: self._pictures[r] for r in rows if r in self._pictures}
        wanted = set(rows)
        # A list first: other threads add other rows meanwhile.
        kept._variants = {k: v for k, v in list(self._variants.items()) if k[0] in wanted}
        kept._boxes = {k: v for k, v in self._boxes.items() if k[0] in wanted}
        return kept

    def error(self, row: int, pixels: Pixels) -> Exception | None:
        """What decoding this variant raises, or None."""
        self._settle(row)
        return self._error(row, pixels)

    def _error(self, row: int, pixels: Pixels) -> Exception | None:
        try:
            self._variant(row, pixels)
        except Exception as error:  # noqa: BLE001  decoders raise anything; here it becomes a value
            return error
        return None


def keeps_whole(variants: Collection[Pixels]) -> bool:
    """Whether pictures stay in memory in full until their chunk is done, for these variants."""
    return not variants or any(p.size is None or p.masked is not None for p in variants)


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
        wanted = variant or Pixels()
        pictures = self.pictures(wanted)
        if wanted.size is None:
            return pictures
        if not pictures:
            return np.empty((0, wanted.size, wanted.size, 3), np.uint8)
        stacked = np.stack(pictures)
        stacked.flags.writeable = False
        return stacked

    def pictures(self, variant: Pixels) -> list[Picture]:
        """The pictures as `pixels` gives them, one array (H, W, 3) each, uncopied."""
        assert self.cache is not None, "this batch has no media"
        self.fill(variant)
        return [self.cache.variant(r, variant) for r in self.rows]

    def fill(self, variant: Pixels) -> None:
        """Have the variant made of all rows, so that asking for one is quick."""
        assert self.cache is not None, "this batch has no media"
        self.know_boxes(variant)
        self.cache.fill(self.rows, variant)

    def know_boxes(self, variant: Pixels) -> None:
        """Tell the cache the boxes that the variant masks, which the table holds."""
        if variant.masked is not None and self.cache is not None:
            self.cache.know_boxes(variant.masked, self.rows, self[variant.masked])

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
