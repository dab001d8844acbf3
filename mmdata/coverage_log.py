"""The coverage log: what the driver learnt of finished shards, so that the next run need not open their files.

In: what is learnt of rows files, column files, passes and verdicts of shards. Out: segments in `state/coverage`, and
the same facts at the next run. A fact about a file holds while the listing shows its number, size and stamp; a pass or
a verdict holds while all the files that it went by do. A file that the log does not know, or knows otherwise, is
believed by its own footer: the log may be lost, and nothing is lost with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.column_files import UNCOVERED, canonical_json, read_footer
from mmdata.coverage_segments import SCHEMA, read_segments, write_segment
from mmdata.errors import StoreError
from mmdata.file_stamps import mix
from mmdata.numbered_files import NumberedFiles, newest_files, stamps_of
from mmdata.plan import chain
from mmdata.set_files import SetFiles
from mmdata.store import Store
from mmdata.survivors import BoundStep
from mmdata.verdict_work import Settled

__all__ = ["CoverageLog", "count_failed", "pass_key"]

SEGMENTS = 16  # more than these are merged into one

Integers = npt.NDArray[np.int64]
Marks = npt.NDArray[np.uint64]


class CoverageLog:
    """The log of one dataset: read at the start of a run, written as it goes on. `rows` and `sets` are there."""

    def __init__(self, store: Store, run: str, sets: dict[str, SetFiles]) -> None:
        self._store, self._run, self.sets = store, run, sets
        found = read_segments(store)
        self._segments = found.names
        self._parts = _cut(found.entries)  # (kind, key) → its entries, oldest first
        self.rows = newest_files(store, "rows", "g")
        self._inputs: dict[str, tuple[str, ...]] = {}  # key of a pass or chain → the sets it goes by
        self._fresh: list[pa.Table] = []  # learnt, and in no segment yet
        self._flushed = 0
        self._last_judged: tuple[tuple[str, int, int], pa.Table] | None = None  # asked for more than once a run
        self._new_rows: dict[int, int] = {}
        self._passed: list[tuple[str, int, Sequence[int]]] = []
        self._judged: list[tuple[str, Settled]] = []

    # Files

    def add_rows(self, shard: int, name: str) -> None:
        """A rows file that was written since."""
        self._new_rows[shard] = int(name.rpartition(".g")[2].removesuffix(".parquet"))

    def read_set(self, set_name: str) -> SetFiles:
        """The column files of a set: those the log knows as they are, the others by their footers.

        StoreError names a file that is torn or foreign.
        """
        if set_name not in self.sets:
            files = newest_files(self._store, f"columns/{set_name}", "c")
            self.sets[set_name] = found = self._known(set_name, files)
            unknown = np.setdiff1d(files.shards, found.files.shards)
            if len(unknown):
                self._believe(set_name, files, unknown)
        return self.sets[set_name]

    def _known(self, set_name: str, files: NumberedFiles) -> SetFiles:
        logged = self._parts.pop(("columns", set_name), None)
        if logged is None or not len(files.shards):
            return SetFiles.none(files.folder)
        places, there = files.places(logged["shard"].to_numpy())
        for name, ours in (("number", files.numbers), ("size", files.sizes), ("stamp", files.stamps)):
            there &= logged[name].to_numpy() == ours[places]
        # A file may have been logged twice, by a run and by the one that took it over: the same facts.
        places, first = np.unique(places[there], return_index=True)
        entries = logged.take(pa.array(np.flatnonzero(there)[first]))
        rows, covered = (entries[name].to_numpy() for name in ("rows", "covered"))
        found = SetFiles(files.at(places), rows, covered, _digests(entries))
        found.hash = entries["hash"][0].as_py() if len(entries) else ""
        return found

    def _believe(self, set_name: str, files: NumberedFiles, unknown: Integers) -> None:
        """Read the footers of the files that the log does not know, and log them."""
        places, _ = files.places(unknown)
        names = [files.name(s, n) for s, n in zip(unknown.tolist(), files.numbers[places].tolist(), strict=True)]
        with ThreadPoolExecutor(8) as pool:
            footers = pool.map(lambda name: read_footer(self._store, name), names)
            self.sets[set_name].update(zip(unknown.tolist(), footers, strict=True))
        self._fold(set_name)

    def _fold(self, set_name: str) -> None:
        """What was added to a set enters the arrays, and the log."""
        found = self.sets[set_name]
        places = found.fold(self._store)
        if len(places):
            files = found.files.at(places)
            facts = {"rows": found.rows[places], "covered": found.covered[places]}
            digests = pa.array([bytes(d) for d in found.digests[places]], pa.binary(32))
            hashes = [found.hash] * len(places)
            self._fresh.append(_entries("columns", set_name, **_of(files), **facts, digest=digests, hash=hashes))

    # Passes and verdicts

    def name_inputs(self, key: str, sets: Iterable[str]) -> None:
        """The sets that a pass or a chain goes by, besides the rows."""
        self._inputs[key] = tuple(dict.fromkeys(sets))

    def keys(self) -> tuple[str, ...]:
        """The passes and chains of this run."""
        return tuple(sorted(self._inputs))

    def inputs(self, key: str, shards: Integers) -> Marks:
        """(N,) uint64: one number for all files of a shard that this goes by; 0 where one is missing."""
        marks = [self.rows.marks_of(shards)]
        for name in self._inputs[key]:
            found = self.sets[name]
            marks.append(found.files.marks_of(shards))
            if found.new:
                marks[-1][np.isin(shards, list(found.new))] = 0
        return np.where(np.all([m != 0 for m in marks], axis=0), mix(*marks), np.uint64(0))

    def _holding(self, kind: str, key: str, shards: Integers) -> pa.Table:
        """The latest entry of this kind for each of these shards, where it went by the files that are there now."""
        logged = self._parts.get((kind, key))
        if logged is None or not len(shards):
            return SCHEMA.empty_table()
        now = self.inputs(key, shards)
        theirs = logged["shard"].to_numpy()
        places = np.minimum(np.searchsorted(shards, theirs), len(shards) - 1)
        holds = (shards[places] == theirs) & (now[places] != 0) & (logged["inputs"].to_numpy() == now[places])
        latest_first = np.flatnonzero(holds)[::-1]
        _, first = np.unique(theirs[latest_first], return_index=True)
        return logged.take(pa.array(latest_first[first]))

    def finished(self, key: str, shards: Integers) -> tuple[Integers, list[int]]:
        """(shards of which this pass is known to be done, the sums of what it counted there); `shards` ascending."""
        found = self._holding("pass", key, shards)
        if not len(found):
            return np.zeros(0, np.int64), []
        sums = pc.list_flatten(found["sums"]).to_numpy().reshape(len(found), -1)
        return found["shard"].to_numpy(), sums.sum(axis=0).tolist()

    def count_reasons(self, name: str) -> int:
        """Permanent error kinds in a column file."""
        reasons = self._store.read_table(name, ["reason"]).column(0)
        is_open = pc.or_(pc.equal(reasons, UNCOVERED), pc.starts_with(reasons, "!"))
        return int(len(reasons) - reasons.null_count - (pc.sum(is_open).as_py() or 0))

    def judged(self, key: str, shards: Integers) -> pa.Table:
        """Verdicts of this chain that hold, in the order of the shards; their files are as they were written."""
        asked = (key, len(shards), self._flushed)
        if self._last_judged is None or self._last_judged[0] != asked:
            self._last_judged = asked, self._judged_now(key, shards)
        return self._last_judged[1]

    def _judged_now(self, key: str, shards: Integers) -> pa.Table:
        found = self._holding("verdict", key, shards)
        stamps = stamps_of(self._store, found["name"].to_pylist(), whole_folders=True)
        recorded = zip(found["size"].to_pylist(), found["stamp"].to_pylist(), strict=True)
        return found.filter(pa.array([a == b for a, b in zip(stamps, recorded, strict=True)], pa.bool_()))

    def row_facts(self, shards: Integers) -> pa.Table:
        """`rows`, `covered` (status ok), `key_min` and `key_max` of these shards, in order; NULL where not known."""
        logged = self._parts.get(("rows", ""), SCHEMA.empty_table())
        marks = mix(*(logged[n].to_numpy().view(np.uint64) for n in ("number", "size", "stamp")))
        theirs = logged["shard"].to_numpy()
        places = np.minimum(np.searchsorted(shards, theirs), max(0, len(shards) - 1))
        chosen = np.full(len(shards), -1)
        if len(shards):
            holds = (shards[places] == theirs) & (self.rows.marks_of(shards)[places] == marks)
            chosen[places[holds]] = np.flatnonzero(holds)
        indexes = pa.array(chosen, mask=chosen < 0)
        return logged.select(["rows", "covered", "key_min", "key_max"]).take(indexes)

    def add_pass(self, key: str, shard: int, sums: Sequence[int]) -> None:
        """A pass of a shard came to its end, and nothing of it is to be tried again."""
        self._passed.append((key, shard, sums))

    def add_verdicts(self, key: str, settled: Settled) -> None:
        """The verdicts of a shard under this chain are written."""
        self._judged.append((key, settled))

    # Writing

    @property
    def waiting(self) -> int:
        """Facts of passes and verdicts that are in no segment yet."""
        return len(self._passed) + len(self._judged)

    def flush(self) -> None:
        """Write what was learnt as the next segment; nothing when nothing was."""
        self._flushed += 1 if self.waiting or self._new_rows or any(f.new for f in self.sets.values()) else 0
        self.rows = self.rows.with_files(self._store, self._new_rows)
        self._new_rows = {}
        for name in self.sets:
            self._fold(name)
        self._flush_passes()
        self._flush_verdicts()
        if self._fresh:
            entries = pa.concat_tables(self._fresh)
            self._fresh = []
            self._segments.append(write_segment(self._store, self._run, self._segments, entries))

    def _flush_passes(self) -> None:
        by_key: dict[str, dict[int, Sequence[int]]] = {}
        for key, shard, sums in self._passed:
            by_key.setdefault(key, {})[shard] = sums
        self._passed = []
        for key, sums_of in by_key.items():
            shards = np.array(sorted(sums_of), np.int64)
            inputs = self.inputs(key, shards)
            known = inputs != 0
            sums = pa.array([sums_of[s] for s in shards[known].tolist()], pa.list_(pa.int64()))
            self._fresh.append(_entries("pass", key, shard=shards[known], inputs=inputs[known], sums=sums))

    def _flush_verdicts(self) -> None:
        by_key: dict[str, dict[int, Settled]] = {}
        for key, settled in self._judged:
            by_key.setdefault(key, {})[settled.shard] = settled
        self._judged = []
        for key, found in by_key.items():
            shards = np.array(sorted(found), np.int64)
            every = [found[s] for s in shards.tolist()]
            self._log_rows(shards, every)
            stamps = stamps_of(self._store, [s.file for s in every])
            inputs = self.inputs(key, shards)
            known = np.flatnonzero((inputs != 0) & np.array([s is not None for s in stamps])).tolist()
            made = _entries(
                "verdict",
                key,
                shard=shards[known],
                inputs=inputs[known],
                size=[stamps[i][0] for i in known],  # type: ignore[index]
                stamp=[stamps[i][1] for i in known],  # type: ignore[index]
                name=[every[i].file for i in known],
                covered=[every[i].unsettled for i in known],
                counts=[json.dumps(every[i].counts) for i in known],
            )
            self._fresh.append(made)
            self._append(("verdict", key), made)

    def _log_rows(self, shards: Integers, settled: Sequence[Settled]) -> None:
        """What the verdicts say of rows files that the log does not describe yet."""
        unknown = np.asarray(pc.is_null(self.row_facts(shards)["rows"]).to_numpy(), bool)
        places, there = self.rows.places(shards)
        chosen = np.flatnonzero(unknown & there)
        if not len(chosen):
            return
        files, those = self.rows.at(places[chosen]), [settled[i] for i in chosen.tolist()]
        made = _entries(
            "rows",
            "",
            **_of(files),
            rows=[s.rows for s in those],
            covered=[s.ok for s in those],
            key_min=[s.key_min for s in those],
            key_max=[s.key_max for s in those],
        )
        self._fresh.append(made)
        self._append(("rows", ""), made)

    def _append(self, name: tuple[str, str], entries: pa.Table) -> None:
        before = self._parts.get(name)
        self._parts[name] = entries if before is None else pa.concat_tables([before, entries])

    def merge(self, keys: Collection[str]) -> None:
        """Where there are many segments, make one of them, and remove those.

        It has the latest of everything, and of passes and chains only those of `keys` and of this run.
        """
        if len(self._segments) <= SEGMENTS:
            return
        keys = {*keys, *self._inputs}
        found = read_segments(self._store)
        sets = set(self._store.column_sets())
        merged = [_latest(t) for (kind, key), t in _cut(found.entries).items() if _counts(kind, key, keys, sets)]
        table = pa.concat_tables(merged) if merged else SCHEMA.empty_table()
        self._segments = [write_segment(self._store, self._run, found.names, table, found.names)]
        for name in found.names:
            self._store.remove(name)

    def gone(self, set_name: str, shard: int) -> StoreError:
        """For a file that this run has just written, and that somebody has removed."""
        return StoreError(
            f"the file of shard {shard:05d} in columns/{set_name} of {self._store.url} has gone while the run went on; "
            "see who removes files there, then run the same command again"
        )


def pass_key(steps: Sequence[BoundStep], begin: int) -> str:
    """16 hex digits for a pass: the steps up to its end, their sets, and which rows they are computed for."""
    sets = {b.step.position: b.set_name for b in steps if b.set_name}
    parts = [chain([b.step for b in steps], sets), begin, [sorted(b.step.ungated_for) for b in steps]]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def count_failed(log: CoverageLog, set_name: str, shards: Integers) -> int:
    """Rows of a group's set that have a permanent error kind instead of a value."""
    log.name_inputs(set_name, [set_name])
    known, sums = log.finished(set_name, shards)
    failed = sums[0] if len(known) else 0
    for shard in np.setdiff1d(shards, known).tolist():
        try:
            here = log.count_reasons(log.sets[set_name][shard].name)
        except KeyError:
            raise log.gone(set_name, shard) from None
        log.add_pass(set_name, shard, [here])
        failed += here
    return failed


def _counts(kind: str, key: str, keys: Collection[str], sets: Collection[str]) -> bool:
    return kind == "rows" or key in (sets if kind == "columns" else keys)


def _latest(entries: pa.Table) -> pa.Table:
    """The last entry of each shard, in the order of the shards."""
    shards = entries["shard"].to_numpy()[::-1]
    _, first = np.unique(shards, return_index=True)
    return entries.take(pa.array(len(shards) - 1 - first))


def _cut(entries: pa.Table) -> dict[tuple[str, str], pa.Table]:
    """(kind, key) → its entries, in the order in which they stand."""
    named = pc.binary_join_element_wise(entries["kind"], entries["key"], " ").combine_chunks().dictionary_encode()
    if not len(entries):
        return {}
    codes = named.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(len(named.dictionary) + 1))
    names = [tuple(name.split(" ", 1)) for name in named.dictionary.to_pylist()]
    return {
        (kind, key): entries.take(pa.array(order[ends[i] : ends[i + 1]])).combine_chunks()
        for i, (kind, key) in enumerate(names)
    }


def _entries(kind: str, key: str, **columns: Any) -> pa.Table:
    """Entries of one kind; what it has no word for is NULL."""
    rows = len(columns["shard"])
    columns |= {"kind": [kind] * rows, "key": [key] * rows}
    arrays = []
    for name in SCHEMA.names:
        values = columns.get(name)
        kind_of = SCHEMA.field(name).type
        arrays.append(pa.nulls(rows, kind_of) if values is None else pa.array(values, kind_of))
    return pa.table(arrays, schema=SCHEMA)


def _of(files: NumberedFiles) -> Mapping[str, Any]:
    return {"shard": files.shards, "number": files.numbers, "size": files.sizes, "stamp": files.stamps}


def _digests(entries: pa.Table) -> npt.NDArray[np.void]:
    """(N,) V32."""
    column = entries["digest"].combine_chunks()
    array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    data = np.frombuffer(array.buffers()[1] or b"", "V32")
    return data[array.offset : array.offset + len(array)]
