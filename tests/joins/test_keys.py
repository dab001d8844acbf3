"""Keys as numbers and the sorted index of them, against Python's own dictionaries."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.joins import keys
from mmdata.joins.keys import IndexBuilder, JoinColumn, keys_of, pair_keys

UID = "00000000000000010000000000000002"


def test_a_uid_is_datacomps_pair_of_numbers() -> None:
    found, valid = keys_of("uid", pa.array([UID, UID.upper()]))
    assert found.tolist() == [[1, 2], [1, 2]]
    assert valid.all()
    pairs = np.array([(int(UID[:16], 16), int(UID[16:32], 16))], dtype="u8,u8")
    assert pair_keys(pairs).tolist() == [[1, 2]]


def test_a_sha256_is_its_first_128_bits_in_either_case() -> None:
    digest = hashlib.sha256(b"media").hexdigest()
    found, valid = keys_of("sha256", pa.array([digest, digest.upper(), "not a hash", None]))
    assert found[0].tolist() == found[1].tolist() == [int(digest[:16], 16), int(digest[16:32], 16)]
    assert valid.tolist() == [True, True, False, False]


@pytest.mark.parametrize("on", ["uid", "url", "key"])
def test_null_and_empty_are_no_keys(on: JoinColumn) -> None:
    assert keys_of(on, pa.array([None, "", "x"]))[1].tolist() == [False, False, True]


def test_white_space_in_hex_is_no_hex() -> None:
    """bytes.fromhex passes over it, so that 31 digits and a blank beside 33 digits would be read as two uids."""
    texts = [" " + UID[1:], UID, UID[:-2] + "\t0"]
    found, _ = keys_of("uid", pa.array(texts))
    alone = [keys_of("uid", pa.array([t]))[0][0].tolist() for t in texts]
    assert found.tolist() == alone
    assert len({tuple(a) for a in alone}) == 3


TEXTS = st.one_of(
    st.none(),
    st.sampled_from(["", "a", "A", UID, UID.upper(), "https://x.org/ä"]),
    st.text(max_size=5),
    st.integers(0, 40).map(lambda n: f"{n:032x}"),
)


def meaning(text: str | None) -> Any:
    """What a uid means: hex in any case is one number."""
    is_hex = text is not None and len(text) == 32 and all(c in "0123456789abcdefABCDEF" for c in text)
    return int(text, 16) if is_hex and text else text or None


@pytest.mark.parametrize("held", [1 << 21, 5])
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(TEXTS, max_size=60), asked=st.lists(TEXTS, max_size=30), cut=st.integers(1, 7))
def test_the_index_finds_the_first_row_of_every_key(
    tmp_path_factory: pytest.TempPathFactory, held: int, rows: list[Any], asked: list[Any], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_HELD", held)  # 5: almost every batch goes to disk
        index = built(rows, folder, cut)
    first: dict[Any, int] = {}
    for number, text in enumerate(rows):
        if meaning(text) is not None:
            first.setdefault(meaning(text), number)
    found = index.find(*keys_of("uid", pa.array(asked, pa.string())))
    assert found.tolist() == [first.get(meaning(t), -1) for t in asked]
    meanings = [meaning(t) for t in rows if meaning(t) is not None]
    repeated = {m for m in meanings if meanings.count(m) > 1}
    assert index.repeated == len(repeated)
    assert (index.example < 0) == (not repeated)
    if repeated:
        assert meaning(rows[index.example]) in repeated


def built(rows: list[Any], folder: Path, cut: int) -> keys.KeyIndex:
    builder = IndexBuilder(folder)
    for begin in range(0, len(rows), cut):
        builder.add(*keys_of("uid", pa.array(rows[begin : begin + cut], pa.string())))
    return builder.finish()


def test_keys_that_share_their_mixed_value_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_mixed", lambda pairs: np.zeros(len(pairs), np.uint64))
    texts = [f"{n:032x}" for n in (7, 3, 7, 9, 3, 1)]
    builder = IndexBuilder(None)
    builder.add(*keys_of("uid", pa.array(texts)))
    index = builder.finish()
    assert index.repeated == 2
    asked = [f"{n:032x}" for n in (1, 3, 5, 7, 9)]
    assert index.find(*keys_of("uid", pa.array(asked))).tolist() == [5, 1, -1, 0, 3]
