"""The kept rows of other datasets, for a group that compares its own rows with them (`against`).

In: dataset folders as the recipe names them (`pets`, or `pets#strict` for one of its selections) and the columns that
are compared. Out: those columns of the kept rows, a shard at a time, and their digest, which enters the group's
identity. What is read is what the datasets' `current.json` named when this was opened. A folder that is no dataset, a
column that is not there or was computed in another way is a RecipeError; files that contradict it are a StoreError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmdata.column_files import canonical_json
from mmdata.errors import RecipeError, StoreError, nearest
from mmdata.plan import Input, PlannedStep, Resolved, identity
from mmdata.selections import Current
from mmdata.stage import column_options, dataset_options
from mmdata.store import Store

__all__ = ["OlderDatasets", "names_older", "require_older"]

_PART_ROWS = 1 << 20
_PART_BYTES = 256 << 20
_MAX_DIFFERENCES = 3


def names_older(step: PlannedStep) -> bool:
    """Whether the step compares its rows with those of other datasets."""
    return step.options is not None and any(dataset_options(step.options).values())


@dataclass
class _Shard:
    """Kept rows of one shard, by its index in `current.shards`: how many, and the place of the first."""

    index: int
    place: int
    rows: int


@dataclass
class _Dataset:
    """One older dataset; `homes` maps a visible column to (set name, own name), '' for base rows."""

    name: str  # as the recipe writes it
    store: Store
    current: Current
    homes: dict[str, tuple[str, str]]
    shards: list[_Shard] = field(default_factory=list)

    def where(self) -> str:
        return f"{self.name!r} of `against`"

    def kept(self, index: int, columns: Sequence[str]) -> pa.Table:
        """row_id and the columns of the kept rows of a shard, in row order."""
        verdicts = self.store.read_table(self.current.verdicts[index], ["row_id", "verdict"])
        owners: dict[str, list[str]] = {"": []}
        for column in columns:
            owners.setdefault(self.homes[column][0], []).append(column)
        found = {"row_id": verdicts.column("row_id")}
        for set_name, names in owners.items():
            file = self.current.rows[index] if not set_name else self.current.sets[set_name][index]
            table = self.store.read_table(file, list(dict.fromkeys(["row_id", *(self.homes[n][1] for n in names)])))
            if not table.column("row_id").equals(found["row_id"]):
                raise StoreError(f"{file} of {self.store.url} has other rows than its shard; run its recipe again")
            found |= {name: table.column(self.homes[name][1]) for name in names}
        return pa.table(found).filter(pc.equal(verdicts.column("verdict"), "kept"))


class OlderDatasets:
    """See `mmdata.stage.OlderRows`. `columns` maps a compared column to its Input in the new dataset."""

    def __init__(self, step: PlannedStep, here: Store) -> None:
        assert step.options is not None
        self._step = step
        compared = {c for names in column_options(step.options).values() for c in names}
        self._inputs = {i.visible: i for i in step.inputs if i.visible in compared}
        self._datasets = [self._open(name, here) for names in dataset_options(step.options).values() for name in names]

    def _where(self) -> str:
        return f"step {self._step.position} ({self._step.name})"

    def _open(self, name: str, here: Store) -> _Dataset:
        path, mark, selection = name.partition("#") if "#" in name.rpartition("/")[2] else (name, "", "")
        store = Store(path)
        if store.url == here.url:
            raise RecipeError(f"{self._where()}: against names this dataset itself; it is for others")
        if not store.exists("dataset.json"):
            raise RecipeError(f"{self._where()}: there is no dataset at {store.url}; against wants a dataset folder")
        current = Current.load(store, selection if mark else None)
        if current is None:
            raise RecipeError(
                f"{self._where()}: no run has finished on {store.url} yet; run its recipe to the end first"
            )
        base = [] if not current.rows else store.column_names(current.rows[0])
        homes = {n: ("", n) for n in base}
        for step in current.steps:
            homes |= {visible: (step.set_name, own) for own, visible in (*step.outputs, *step.aside)}
        return _Dataset(name, store, current, homes)

    def require_same(self, sets: Mapping[int, tuple[str, Mapping[str, Any]]]) -> None:
        """RecipeError unless every compared column is there and is the same there.

        `sets`: position of a step → name and identity document of its set, as far as they are known.
        """
        for dataset in self._datasets:
            if dataset.current.shards:
                for column, item in self._inputs.items():
                    self._require_column(dataset, column, item, sets)

    def _require_column(
        self, dataset: _Dataset, column: str, item: Input, sets: Mapping[int, tuple[str, Mapping[str, Any]]]
    ) -> None:
        where = f"{self._where()}: {dataset.where()}"
        if column not in dataset.homes:
            cure = nearest(column, dataset.homes)
            raise RecipeError(f"{where} has no column {column!r}{cure}; run its recipe with the step that makes it")
        theirs, own = dataset.homes[column]
        if (item.made_by is None) != (theirs == "") or item.own != own:
            here, there = (f"by step {item.made_by}" if item.made_by else "in the source"), (theirs or "its source")
            raise RecipeError(
                f"{where}: column {column!r} comes from {there}, here it is made {here}; compare like with like"
            )
        if item.made_by is None or item.made_by not in sets:
            return
        name, document = sets[item.made_by]
        if name != theirs:
            told = _differences(document, dataset.store, dataset.current.sets[theirs][0])
            raise RecipeError(
                f"{where}: column {column!r} was computed by {theirs}, here by {name}: {told}; compute it in both with "
                "the same operator, version and options"
            )

    def digest(self) -> str:
        """sha256 over the kept rows of every dataset: row_ids and compared values, in order."""
        found = hashlib.sha256()
        place = 0
        for dataset in self._datasets:
            dataset.shards = []
            found.update(b"dataset")
            for index in range(len(dataset.current.shards)):
                table = dataset.kept(index, list(self._inputs))
                dataset.shards.append(_Shard(index, place, len(table)))
                place += len(table)
                for name in table.column_names:
                    _add(found, table.column(name))
        return found.hexdigest()

    def _places(self) -> Iterator[tuple[_Dataset, _Shard]]:
        return ((d, s) for d in self._datasets for s in d.shards)

    def parts(self) -> Iterator[pa.Table]:
        """See `OlderRows`; some million rows at a time, fewer of wide columns. `digest` must have been taken."""
        held: list[pa.Table] = []
        for dataset, shard in self._places():
            table = dataset.kept(shard.index, list(self._inputs)).drop_columns(["row_id"])
            if len(table) != shard.rows:
                raise StoreError(f"{dataset.store.url} has changed while its rows were read; run again")
            held.append(table.append_column("place", pa.array(np.arange(shard.place, shard.place + shard.rows))))
            if sum(map(len, held)) >= _PART_ROWS or sum(t.nbytes for t in held) >= _PART_BYTES:
                yield pa.concat_tables(held)
                held = []
        if held:
            yield pa.concat_tables(held)

    def look_up(self, places: npt.NDArray[np.int64]) -> pa.Table:
        """See `OlderRows`."""
        found = [_FOUND.empty_table()]
        for dataset, shard in self._places():
            mine = places[(places >= shard.place) & (places < shard.place + shard.rows)] - shard.place
            if len(mine):
                table = dataset.kept(shard.index, ["key"]).take(pa.array(mine))
                names = pa.array([dataset.name] * len(mine), pa.string())
                found.append(pa.table([table.column("row_id"), table.column("key"), names], schema=_FOUND))
        return pa.concat_tables(found)


_FOUND = pa.schema([("row_id", pa.int64()), ("key", pa.string()), ("dataset", pa.string())])


def require_older(steps: Sequence[PlannedStep], here: Store) -> None:
    """What `plan` can tell of every `against`: RecipeError when a dataset is not there, or its column is another.

    Sets whose identity is settled on a machine, and those of groups, are compared when the group runs.
    """
    sets: dict[int, str] = {}
    known: dict[int, tuple[str, Mapping[str, Any]]] = {}
    for step in steps:
        if names_older(step):
            OlderDatasets(step, here).require_same(known)
        contract = step.contract
        if step.kind != "stage" or contract is None or contract.batch_shape is not None:
            continue
        if all(w.fingerprint for w in contract.weights) and {i.made_by for i in step.inputs} <= {None, *sets}:
            name, document, _ = identity(step, Resolved(precision=contract.precision), sets)
            sets[step.position], known[step.position] = name, (name, document)


def _differences(document: Mapping[str, Any], store: Store, file: str) -> str:
    """What of two identities differs, in words."""
    theirs = json.loads(store.footer(file)["mmdata.identity"])
    told = [
        f"{k} is {canonical_json(theirs.get(k))} there and {canonical_json(document.get(k))} here"
        for k in sorted({*document, *theirs})
        if canonical_json(document.get(k)) != canonical_json(theirs.get(k))
    ]
    return ", ".join(t[:200] for t in told[:_MAX_DIFFERENCES])


def _add(digest: Any, column: pa.ChunkedArray) -> None:
    """The values, whatever chunks they lie in."""
    array = column.combine_chunks()
    digest.update(str(array.type).encode())
    digest.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        digest.update(np.ascontiguousarray(array.fill_null(0).to_numpy(zero_copy_only=False)).tobytes())
    elif pa.types.is_fixed_size_list(array.type):
        _add(digest, pa.chunked_array([array.flatten()]))  # of the rows that are not NULL
    else:
        words = ["" if v is None else v if isinstance(v, str) else repr(v) for v in array.to_pylist()]
        digest.update(np.array([len(w) for w in words], "<i8").tobytes())
        digest.update("".join(words).encode())
