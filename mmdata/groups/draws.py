"""Random numbers that belong to rows: the same for a row whatever shard, worker or order it comes in.

In: a seed, the rows' uids, and for one number per row and concept the concept's text. Out: uniform numbers in (0, 1).
They are XXH64 hashes, seeded by the seed, of 8 bytes for the row and 8 for the concept: of a uid XXH64 of its 32
characters, of any other text BLAKE2b. Two rows with one uid draw the same; a row without one draws by its row_id.
Nothing fails.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.models.xxh64 import xxh64

__all__ = ["row_words", "text_word", "uniform"]

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

_UID_BYTES = 32


def text_word(text: str) -> int:
    """First 8 bytes, little-endian, of BLAKE2b-64 of the text in UTF-8."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def row_words(rows: pa.Table) -> Words:
    """(N,) of what stands for each row: its `uid`, else its `row_id`."""
    uids = rows.column("uid").combine_chunks().cast(pa.binary())
    usual = pc.equal(pc.binary_length(uids), _UID_BYTES).fill_null(False)
    words = np.empty(len(rows), np.uint64)
    packed = uids.filter(usual).cast(pa.binary(_UID_BYTES))
    lanes = np.frombuffer(b"" if not len(packed) else packed.buffers()[1], "<u8").reshape(-1, _UID_BYTES // 8)
    is_usual = np.asarray(usual)
    words[is_usual] = xxh64([np.ascontiguousarray(lanes[: len(packed), i]) for i in range(_UID_BYTES // 8)])
    for place in np.flatnonzero(~is_usual).tolist():
        uid = rows.column("uid")[place].as_py()
        words[place] = text_word(str(rows.column("row_id")[place]) if uid is None else uid)
    return words


def uniform(seed: int, *words: Words) -> Floats:
    """(N,) numbers in (0, 1), one for each place of `words`: 52 bits of the hash and a half, which a float64 holds."""
    hashed = xxh64([np.ascontiguousarray(w, np.uint64) for w in words], seed)
    return ((hashed >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
