"""Column files: coverage only grows, and what an earlier file computed stays as it was."""

from __future__ import annotations

import hashlib
import struct
import threading
import uuid
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata.column_files import canonical_json, covered_mask
from mmdata.errors import StoreError
from mmdata.store import (
    ColumnFooter,
    Store,
    covered_digest,
    publish_columns,
    shard_name,
    write_column_file,
    write_parquet,
)

FOOTER = ColumnFooter.of('{"name":"score"}')
SET = "score-0123456789abcdef"


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "pets") if request.param == "local" else f"memory://{uuid.uuid4().hex}/pets")


def table(reasons: list[str | None], value: float = 1.0, first: int = 0) -> pa.Table:
    """One row a reason; the value only where it was computed."""
    return pa.table(
        {
            "row_id": pa.array(range(first, first + len(reasons)), pa.int64()),
            "score": pa.array([value if r is None else None for r in reasons], pa.float64()),
            "reason": pa.array(reasons, pa.string()),
        }
    )


def test_digest_by_hand() -> None:
    # sha256 of the little-endian int64 of -1, 2 and 2^24, in that order
    by_hand = b"\xff" * 8 + b"\x02" + b"\0" * 7 + b"\0\0\0\x01\0\0\0\0"
    assert covered_digest(np.array([1 << 24, -1, 2])) == hashlib.sha256(by_hand).hexdigest()
    assert covered_digest(np.array([], np.int64)) == hashlib.sha256(b"").hexdigest()


def test_what_counts_as_covered() -> None:
    reasons = [None, "uncovered", "!timeout", "decode", "!", "", "uncovered!"]
    assert covered_mask(table(reasons)).tolist() == [True, False, False, True, False, True, True]


def test_shard_names() -> None:
    assert [shard_name(n) for n in (0, 5, 99_999, 100_000)] == ["00000", "00005", "99999", "100000"]


def test_canonical_json() -> None:
    assert (
        canonical_json({"b": [1, 2.5, None], "a": {"z": "é", "y": True}}) == '{"a":{"y":true,"z":"é"},"b":[1,2.5,null]}'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_a_larger_coverage_is_the_next_file(store: Store) -> None:
    first = publish_columns(store, SET, 0, table([None, "uncovered", "!timeout", "decode"], 1.0), FOOTER)
    assert (first.name, first.number, first.rows, first.covered) == (f"columns/{SET}/00000.c0.parquet", 0, 4, 2)
    assert first.digest == hashlib.sha256(struct.pack("<2q", 0, 3)).hexdigest()
    assert publish_columns(store, SET, 0, table(["uncovered"] * 4), FOOTER) == first
    assert publish_columns(store, SET, 0, table([None, "uncovered", "!timeout", None], 9.0), FOOTER) == first

    second = publish_columns(store, SET, 0, table([None, None, "!http", "uncovered"], 2.0), FOOTER)
    assert (second.number, second.covered) == (1, 3)
    assert second.digest == hashlib.sha256(struct.pack("<3q", 0, 1, 3)).hexdigest()
    assert store.read_table(second.name).to_pydict() == {
        "row_id": [0, 1, 2, 3],
        "score": [1.0, 2.0, None, None],
        "reason": [None, None, "!http", "decode"],
    }
    assert store.coverage(SET) == {0: second}
    assert store.column_sets() == [SET]
    assert store.coverage("other-0") == {}


def test_the_loser_of_a_race_merges_from_the_winner(tmp_path: Path) -> None:
    class LooksTooEarly(Store):
        looks = 0

        def newest_column_file(self, set_name: str, shard: int):  # type: ignore[no-untyped-def]
            self.looks += 1
            return None if self.looks == 1 else super().newest_column_file(set_name, shard)

    store = LooksTooEarly(str(tmp_path / "pets"))
    publish_columns(Store(store.url), SET, 3, table([None, None, "uncovered"], 1.0), FOOTER)
    ours = publish_columns(store, SET, 3, table(["uncovered", None, None], 2.0), FOOTER)
    assert (store.looks, ours.number) == (1, 1)
    assert store.read_table(ours.name)["score"].to_pylist() == [1.0, 1.0, 2.0]
    assert store.list(f"columns/{SET}") == ["00003.c0.parquet", "00003.c1.parquet"]


def test_many_writers_at_once_lose_nothing(store: Store) -> None:
    barrier, writers = threading.Barrier(6), 6

    def write(number: int) -> None:
        reasons = [None if row % writers == number else "uncovered" for row in range(60)]
        barrier.wait()
        publish_columns(store, SET, 0, table(reasons, float(number)), FOOTER)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    newest = store.coverage(SET)[0]
    assert (newest.number, newest.covered) == (5, 60)
    assert store.read_table(newest.name)["score"].to_pylist() == [float(row % writers) for row in range(60)]


REASON = st.sampled_from([None, None, "uncovered", "!timeout", "!http", "decode", "not_finite"])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda rows: st.lists(st.lists(REASON, min_size=rows, max_size=rows), min_size=1, max_size=4)
    )
)
def test_any_writers_in_any_order_add_up(writers: list[list[str | None]]) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}/pets")
    expected: list[tuple[float | None, str | None] | None] = [None] * len(writers[0])  # None: not covered yet
    last = -1
    for number, reasons in enumerate(writers):
        grew = False
        for row, reason in enumerate(reasons):
            if expected[row] is None and not (reason == "uncovered" or (reason or "").startswith("!")):
                expected[row] = (float(number) if reason is None else None, reason)
                grew = True
        newest = publish_columns(store, SET, 0, table(reasons, float(number)), FOOTER)
        got = store.read_table(newest.name)
        cells = list(zip(got["score"].to_pylist(), got["reason"].to_pylist(), strict=True))
        for row, cell in enumerate(cells):
            if expected[row] is not None:
                assert cell == expected[row]
            else:
                seen = [w[row] for w in writers[: number + 1]]
                transient = [r for r in seen if r != "uncovered"]
                assert cell == (None, transient[-1] if transient else "uncovered")
        covered = [row for row, cell in enumerate(expected) if cell is not None]
        assert newest.covered == len(covered)
        assert newest.digest == hashlib.sha256(struct.pack(f"<{len(covered)}q", *covered)).hexdigest()
        assert newest.number in (last, last + 1)
        assert not grew or newest.number == last + 1
        last = newest.number


# Every type a stage may write comes back as it was, and merges with a file on disk.
NESTED = pa.list_(pa.struct([pa.field("q", pa.string()), pa.field("n", pa.int32())]))
TYPES = {
    "uint64": (pa.uint64(), [2**64 - 1, 0]),
    "float16 list": (pa.list_(pa.float16(), 2), [np.array([1, 2], "f2"), np.array([3, 4], "f2")]),
    "list of struct": (NESTED, [[{"q": "a", "n": 1}], []]),
    "bool": (pa.bool_(), [True, False]),
    "binary": (pa.binary(), [b"\0\xff", b""]),
    "large_string": (pa.large_string(), ["é", ""]),
    "timestamp": (pa.timestamp("ms", "UTC"), [0, 1]),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), ["a", "b"]),
}


@pytest.mark.parametrize("kind", TYPES)
def test_types_survive_a_merge(tmp_path: Path, kind: str) -> None:
    arrow, (one, two) = TYPES[kind]
    store = Store(str(tmp_path / "pets"))

    def of(value: object, reasons: list[str | None]) -> pa.Table:
        values = pa.array([value if r is None else None for r in reasons], arrow)
        return table(reasons).set_column(1, pa.field("x", arrow), values)

    publish_columns(store, SET, 0, of(one, [None, "uncovered", "decode"]), FOOTER)
    newest = publish_columns(store, SET, 0, of(two, ["uncovered", None, None]), FOOTER)
    got = store.read_table(newest.name)
    assert newest.number == 1
    assert got.schema.field("x").type == arrow
    assert got["x"].to_pylist() == [*pa.array([one, two], arrow).to_pylist(), None]


def test_another_identity_schema_or_shard_is_refused(store: Store) -> None:
    publish_columns(store, SET, 0, table([None, None]), FOOTER)
    with pytest.raises(StoreError, match=rf"columns/{SET}/00000\.c0\.parquet .* was computed under identity"):
        publish_columns(store, SET, 0, table([None, None]), ColumnFooter.of('{"name":"other"}'))
    with pytest.raises(StoreError, match="raise its version"):
        publish_columns(store, SET, 0, table([None, None]).rename_columns(["row_id", "other", "reason"]), FOOTER)
    with pytest.raises(StoreError, match="other row_ids"):
        publish_columns(store, SET, 0, table([None, None], first=1), FOOTER)
    with pytest.raises(StoreError, match="other row_ids"):
        publish_columns(store, SET, 0, table([None, None, None]), FOOTER)
    assert store.list(f"columns/{SET}") == ["00000.c0.parquet"]


@pytest.mark.parametrize(
    "wrong",
    [
        table([None]).select(["score", "row_id", "reason"]),
        table([None]).select(["row_id", "score"]),
        table([None]).append_column("reason", pa.array(["x"])),
        table([None]).set_column(0, "row_id", pa.array([1], pa.int32())),
        table([None]).set_column(0, "row_id", pa.array([None], pa.int64())),
        table([None]).set_column(2, "reason", pa.array([1])),
    ],
)
def test_a_table_of_another_shape_is_refused(store: Store, tmp_path: Path, wrong: pa.Table) -> None:
    with pytest.raises(StoreError, match="row_id"):
        publish_columns(store, SET, 0, wrong, FOOTER)
    with pytest.raises(StoreError, match="row_id"):
        write_column_file(tmp_path / "x.parquet", wrong, FOOTER)
    assert store.list(f"columns/{SET}") == []


def test_foreign_and_torn_files_are_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "pets"))
    publish_columns(store, SET, 0, table([None, None]), FOOTER)
    whole = (tmp_path / "pets" / "columns" / SET / "00000.c0.parquet").read_bytes()
    folder = tmp_path / "pets" / "columns" / SET

    (folder / "00001.c0.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"00001\.c0\.parquet of .* is not a whole Parquet file"):
        store.coverage(SET)
    pq.write_table(table([None]), folder / "00001.c0.parquet")
    with pytest.raises(StoreError, match=r"00001\.c0\.parquet of .* is not a column file of mmdata"):
        store.coverage(SET)
    footer = FOOTER.describe(table([None])).to_metadata()
    pq.write_table(table([None, None]).replace_schema_metadata(footer), folder / "00001.c0.parquet")
    with pytest.raises(StoreError, match=r"00001\.c0\.parquet of .* holds 2 rows, its footer says 1"):
        store.coverage(SET)
    footer["mmdata.format"] = "2"
    pq.write_table(table([None]).replace_schema_metadata(footer), folder / "00001.c0.parquet")
    with pytest.raises(StoreError, match=r"00001\.c0\.parquet of .* has format 2"):
        store.coverage(SET)
    (folder / "00001.c0.parquet").unlink()
    (folder / "copy of 00000.parquet").write_bytes(whole)
    with pytest.raises(StoreError, match="copy of 00000"):
        store.coverage(SET)
    (folder / "copy of 00000.parquet").unlink()
    (folder / ".tmp-1-ab").write_bytes(b"half")
    assert list(store.coverage(SET)) == [0]


def test_coverage_of_many_shards_is_in_order(store: Store) -> None:
    for shard in (11, 2, 100_000, 0):
        publish_columns(store, SET, shard, table([None] * (shard % 7 + 1)), FOOTER)
    assert [(s, f.rows) for s, f in store.coverage(SET).items()] == [(0, 1), (2, 3), (11, 5), (100_000, 6)]


ROWS = 300_000  # several data pages a column


def test_equal_tables_make_equal_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = pa.table(
        {
            "row_id": pa.array(range(ROWS), pa.int64()),
            "caption": pa.array([None if n % 7 == 0 else f"caption {n % 300}" for n in range(ROWS)]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(rng.random(4 * ROWS).astype("f2")), 4),
            "score": pa.array(rng.random(ROWS)),
            "reason": pa.array([None if n % 3 else "decode" for n in range(ROWS)]),
        }
    )
    pieces = pa.concat_tables([whole.slice(0, 17), whole.slice(17, 3000), whole.slice(3017)])
    padded = pa.concat_tables([whole.slice(0, 40), whole]).slice(40)
    for name, one in (("whole", whole), ("pieces", pieces), ("padded", padded)):
        write_parquet(one, tmp_path / name, {"b": "2", "a": "1"})
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes() == (tmp_path / "padded").read_bytes()
    assert pq.read_table(tmp_path / "pieces").equals(whole)
    write_parquet(whole.replace_schema_metadata({"pandas": "{}"}), tmp_path / "plain", row_group_rows=100_000)
    with pq.ParquetFile(tmp_path / "plain") as file:
        assert file.num_row_groups == 3
        assert set(file.metadata.metadata) == {b"ARROW:schema"}
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        assert file.metadata.row_group(1).column(0).statistics.min == 100_000


def test_pieces_with_their_own_dictionaries_make_equal_bytes(tmp_path: Path) -> None:
    pieces = [pa.array(words * 1000).dictionary_encode() for words in (["b", "a"], ["a", "c"])]
    chunked = pa.table({"language": pa.chunked_array(pieces)})
    write_parquet(chunked, tmp_path / "pieces")
    write_parquet(chunked.unify_dictionaries(), tmp_path / "unified")
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "unified").read_bytes()


def test_a_full_scratch_disk_is_one_sentence(tmp_path: Path) -> None:
    full = tmp_path / "full.parquet"
    full.symlink_to("/dev/full")  # a link, because pyarrow removes what it could not write, and root may remove devices
    with pytest.raises(StoreError, match=f"cannot write {full}: the disk is full"):
        write_parquet(table([None]), full)


def test_duckdb_reads_the_footer_and_the_rows(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "pets"))
    newest = publish_columns(store, SET, 0, table([None, "decode"], 0.5), FOOTER)
    path = store.path_for_duckdb(newest.name)
    with duckdb.connect() as connection:
        assert connection.execute("SELECT * FROM read_parquet(?)", [path]).fetchall() == [
            (0, 0.5, None),
            (1, None, "decode"),
        ]
        query = "SELECT decode(key), decode(value) FROM parquet_kv_metadata(?)"
        pairs = dict(connection.execute(query, [path]).fetchall())
    del pairs["ARROW:schema"]
    assert pairs == {
        "mmdata.format": "1",
        "mmdata.identity": '{"name":"score"}',
        "mmdata.hash": hashlib.sha256(b'{"name":"score"}').hexdigest(),
        "mmdata.rows": "2",
        "mmdata.covered": "2",
        "mmdata.covered_sha256": hashlib.sha256(struct.pack("<2q", 0, 1)).hexdigest(),
    }
