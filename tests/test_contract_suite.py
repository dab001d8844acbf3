"""What every registered operator promises, checked for each of them: a new one gets these tests for free.

What each of them is given stands in `tests/fixtures/every_operator.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import held_rows
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from batches import make_batch, png
from every_operator import (
    BUILT_IN,
    COLUMNS,
    GROUPS,
    IMAGE_STAGES,
    LOOKUPS,
    MODEL_STAGES,
    OPTIONS,
    ROWS,
    STAGES,
    bound,
    opened,
    pictures,
    scratch,
)

from mmdata import registry
from mmdata.batch import Batch
from mmdata.isolate import StepTracker, compute_rows
from mmdata.stage import Contract, Failed, Group, Lookup, Stage, column_options


def batch_for(contract: Contract, rows: list[int], media: dict[int, bytes | None] | None = None) -> Batch:
    """The given rows of the fixture; `media` replaces the picture of some."""
    read = [c for c in contract.reads if c != "image"]
    missing = [c for c in read if c not in COLUMNS]
    assert not missing, f"the operator reads {missing}: add values for them to COLUMNS"
    columns = {c: COLUMNS[c].take(pa.array(rows, pa.int64())) for c in read}
    if "image" not in contract.reads:
        return make_batch(None, **(columns or {"key": COLUMNS["key"].take(pa.array(rows, pa.int64()))}))
    return make_batch([(media or {}).get(row, pictures()[row]) for row in rows], **columns)


def compute(stage: Stage[Any], contract: Contract, rows: list[int]) -> pa.Table:
    """The stage's answer as an Arrow table of the promised schema."""
    batch = batch_for(contract, rows)
    answer = stage.compute(batch)
    assert sorted(answer) == sorted(contract.writes.names)
    assert {len(v) for v in answer.values()} == {len(rows)}
    cells = {n: v.to_pylist() if hasattr(v, "to_pylist") else list(v) for n, v in answer.items()}
    assert not [v for values in cells.values() for v in values if isinstance(v, Failed)], "no row of these is bad"
    return pa.table([pa.array(cells[f.name], f.type) for f in contract.writes], schema=contract.writes)


def bits(table: pa.Table) -> list[tuple[Any, ...]]:
    """Rows as comparable values; floats by their bits."""
    columns = [[v.hex() if isinstance(v, float) else v for v in c.to_pylist()] for c in table.columns]
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("name", BUILT_IN)
def test_is_documented(name: str):
    operator = registry.operator(name)
    assert operator.name == name
    assert operator.__doc__ is not None
    for words in ("Reads", "NULL"):
        assert words in operator.__doc__, f"{name}: the docstring does not say what it {words}"
    assert "Source" in operator.__doc__ or issubclass(operator, Group)
    bound_operator, contract = bound(name)
    by_user = set(getattr(bound_operator.options, "columns", ()))  # columns that the recipe names itself
    written = [c for c in contract.writes.names if f"`{c}`" not in operator.__doc__ and c not in by_user]
    assert not written, f"{name}: the docstring does not explain {written}"
    undescribed = [n for n, f in operator.options_type.model_fields.items() if not f.description]
    assert not undescribed, f"{name}: options {undescribed} have no description"


@pytest.mark.parametrize("name", BUILT_IN)
def test_reads_the_columns_its_options_name(name: str):
    operator, contract = bound(name)
    named = {c for columns in column_options(operator.options).values() for c in columns}
    assert named <= set(contract.reads)
    assert len(set(contract.reads)) == len(contract.reads)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("rows", [[], [0], [3], list(range(ROWS))], ids=["none", "one", "another", "all"])
def test_answers_with_the_promised_columns(name: str, rows: list[int]):
    stage, contract = opened(name)
    table = compute(stage, contract, rows)
    for column in table.columns:
        if pa.types.is_floating(column.type):
            assert np.isfinite(column.drop_null().to_numpy()).all()


@pytest.mark.parametrize("name", STAGES)
def test_order_and_neighbours_change_no_bit(name: str):
    stage, contract = opened(name)
    whole = bits(compute(stage, contract, list(range(ROWS))))
    order = np.random.default_rng(4).permutation(ROWS).tolist()
    assert bits(compute(stage, contract, order)) == [whole[i] for i in order]
    for some in ([5], [8, 0], list(range(3, ROWS))):
        assert bits(compute(stage, contract, some)) == [whole[i] for i in some]


def leaves(array: pa.Array) -> list[pa.Array]:
    """The plain arrays inside a nested one, and how long its lists are."""
    if pa.types.is_struct(array.type):
        return [array.is_valid(), *(leaf for part in array.flatten() for leaf in leaves(part))]
    if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return [pc.list_value_length(array), *leaves(array.flatten())]
    return [array]


@pytest.mark.parametrize("name", MODEL_STAGES)
def test_batch_shape_stays_within_tolerance(name: str):
    stage, contract = opened(name)
    small, _ = opened(name, 3)
    whole, other = (compute(s, contract, list(range(ROWS))) for s in (stage, small))
    for field in contract.writes:
        for left, right in zip(*(leaves(t.column(field.name).combine_chunks()) for t in (whole, other)), strict=True):
            if pa.types.is_floating(left.type):
                left, right = (a.to_numpy(zero_copy_only=False).astype(np.float64) for a in (left, right))
                np.testing.assert_allclose(left, right, rtol=0, atol=contract.tolerance)
            else:
                assert left == right


@pytest.mark.parametrize("name", STAGES)
def test_null_columns_are_no_accident(name: str):
    """Every nullable input NULL in every row: values or NULLs, no exception and no failure."""
    stage, contract = opened(name)
    batch = batch_for(contract, [0, 4])
    for index, column in enumerate(batch.table.column_names):
        if column not in ("row_id", "key"):
            kind = batch.table.schema.field(column).type
            batch.table = batch.table.set_column(index, column, pa.nulls(2, kind))
    results = compute_rows(stage, contract, batch, StepTracker(name))
    assert not [r for r in results if isinstance(r, Failed)]


@pytest.mark.parametrize("name", IMAGE_STAGES)
def test_bad_media_costs_its_own_row(name: str):
    stage, contract = opened(name)
    whole = png(pictures()[0])
    media = {1: whole[: len(whole) // 2], 2: b"<html>not a picture</html>", 3: None, 5: b""}
    results = compute_rows(stage, contract, batch_for(contract, list(range(ROWS)), media), StepTracker(name))
    kinds = {i: r.kind for i, r in enumerate(results) if isinstance(r, Failed)}
    assert kinds == {1: "decode", 2: "not_media", 3: "missing_media", 5: "not_media"}
    clean = compute(stage, contract, list(range(ROWS))).to_pylist()
    for index, result in enumerate(results):
        if index not in kinds:
            assert pa.Table.from_pylist([result], contract.writes).to_pylist() == [clean[index]]


@pytest.mark.parametrize("name", IMAGE_STAGES)
def test_pictures_are_left_as_they_were(name: str):
    stage, contract = opened(name)
    batch = batch_for(contract, list(range(ROWS)))
    stage.compute(batch)
    for picture, expected in zip(batch.pixels(), pictures(), strict=True):
        assert (picture == expected).all()
        assert not picture.flags.writeable


def rows_of(contract: Contract, rows: int = ROWS) -> pa.Table:
    repeated = pa.array([i % ROWS for i in range(rows)], pa.int64())
    ids = pa.array([(i * 7919) % 1_000_003 for i in range(rows)], pa.int64())
    return pa.table({"row_id": ids, **{c: COLUMNS[c].take(repeated) for c in contract.reads}})


def group_table(name: str, rows: pa.Table) -> pa.Table:
    group, contract = bound(name)
    assert isinstance(group, Group)
    with tempfile.TemporaryDirectory() as folder:
        answer = held_rows.compute(group, rows, Path(folder))
    assert sorted(answer) == sorted(contract.writes.names)
    cells = {n: v.to_pylist() if hasattr(v, "to_pylist") else list(v) for n, v in answer.items()}
    assert {len(v) for v in cells.values()} == {len(rows)}
    return pa.table([pa.array(cells[f.name], f.type) for f in contract.writes], schema=contract.writes)


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookup_answers_alone_as_among_others(name: str, tmp_path: Path):
    lookup, contract = bound(name)
    assert isinstance(lookup, Lookup)
    lookup.open(tmp_path)
    [key] = contract.reads
    keys = pa.chunked_array([[*COLUMNS[key].to_pylist(), None, ""]], pa.string())
    whole = lookup.compute(keys)
    assert whole.schema.equals(pa.schema([*contract.writes, ("reason", pa.string())]))
    assert lookup.compute(keys.slice(0, 0)).schema.equals(whole.schema)
    for row in range(len(keys)):
        assert lookup.compute(keys.slice(row, 1)).to_pylist() == whole.slice(row, 1).to_pylist()
    assert whole["reason"].to_pylist()[-2:] == ["no_key", "no_key"]
    assert whole.slice(ROWS).drop_columns("reason").to_pylist() == [dict.fromkeys(contract.writes.names)] * 2


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("rows", [0, 1, ROWS, 20 * ROWS])
def test_group_answers_with_the_promised_columns(name: str, rows: int):
    table = group_table(name, rows_of(bound(name)[1], rows))
    assert len(table) == rows


@pytest.mark.parametrize("name", GROUPS)
def test_group_is_the_same_on_one_thread_and_two(name: str):
    rows = rows_of(bound(name)[1], 5000)
    before = pa.cpu_count()
    try:
        found = []
        for threads in (1, 2):
            pa.set_cpu_count(threads)
            found.append(bits(group_table(name, rows)))
    finally:
        pa.set_cpu_count(before)
    assert found[0] == found[1]
    chunked = pa.concat_tables([rows.slice(start, 700) for start in range(0, 5000, 700)])
    assert bits(group_table(name, chunked)) == found[0]


@pytest.mark.parametrize("name", GROUPS)
def test_group_with_every_input_null(name: str):
    contract = bound(name)[1]
    rows = rows_of(contract)
    for column in contract.reads:
        if column != "key":
            index = rows.column_names.index(column)
            rows = rows.set_column(index, column, pa.nulls(len(rows), rows.schema.field(column).type))
    assert len(group_table(name, rows)) == ROWS


_PLAN = """
import json, sys
from mmdata import registry
for name, options in json.loads(sys.argv[1]).items():
    operator = registry.operator(name)
    operator.contract(operator.options_type.model_validate(options))
print(json.dumps(sorted({"torch", "torchvision", "open_clip", "transformers", "ray", "fasttext"} & set(sys.modules))))
"""


def test_contracts_import_no_model_package():
    options = {name: OPTIONS[name](scratch()) if name in OPTIONS else {} for name in BUILT_IN}
    options |= {"score_clip": {}}  # the default names an architecture of open_clip's
    command = [sys.executable, "-c", _PLAN, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
