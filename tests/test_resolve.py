"""Weights that a hub or a tag names: brought once, and before the first picture is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from server import BadServer

import mmdata
from mmdata import registry
from mmdata.errors import RecipeError
from mmdata.stage import Contract, Options, Stage, Weights, parse_schema

SHA = "sha256:" + "5" * 64


class BroughtOptions(Options):
    log: str


class Brought(Stage[BroughtOptions]):
    """A stage whose weights nobody has seen before they are brought."""

    name, label = "brought_by_test", "brought"

    @classmethod
    def contract(cls, options: BroughtOptions) -> Contract:
        return Contract(writes=parse_schema("brought: int64"), reads=("caption",), weights=(Weights("net"),))

    @classmethod
    def resolve_weights(cls, options: BroughtOptions) -> dict[str, str]:
        with Path(options.log).open("a") as log:
            log.write("brought\n")
        return {"net": SHA}

    def compute(self, batch: Any) -> dict[str, Any]:
        with Path(self.options.log).open("a") as log:
            log.write("computed\n")
        return {"brought": [len(c) for c in batch["caption"]]}


@pytest.fixture
def server() -> Iterator[BadServer]:
    with BadServer() as running:
        yield running


@pytest.fixture
def document(tmp_path: Path, server: BadServer) -> dict[str, Any]:
    """Three pictures, and a group, so that what follows it is a pass of its own."""
    urls = [server.url(f"/ok/{i}") for i in range(3)]
    pq.write_table(pa.table({"url": urls, "text": ["one", "two", "three"]}), tmp_path / "pairs.parquet")
    source = {"kind": "urls", "path": str(tmp_path / "pairs.parquet"), "caption": "text"}
    whole = {"name": "r", "dataset": str(tmp_path / "dataset"), "source": source, "fetch": {"allow_private": True}}
    return {**whole, "steps": [{"exact_duplicates": {"of": ["caption"]}}]}


@pytest.mark.parametrize("runner", ["inline", "processes"])
def test_weights_that_are_not_to_be_had_cost_no_fetch(document: dict[str, Any], server: BadServer, runner: Any) -> None:
    """As a misspelt tag would, after a day of fetching; open_clip itself says which tags there are."""
    document["steps"].append({"score_clip": {"model": "ViT-B-32", "pretrained": "laion2b_s34b"}})
    with pytest.raises(RecipeError, match=r"ViT-B-32 has no weights called 'laion2b_s34b'; open_clip knows: .*openai"):
        mmdata.run(document, runner=runner)
    assert not server.hits
    document["steps"].pop()
    assert len(mmdata.run(document, runner=runner).samples().fetchall()) == 3
    assert sum(server.hits.values()) >= 3


def test_they_are_brought_once_and_first(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register(Brought)
    document["steps"].append({"brought_by_test": {"log": str(tmp_path / "log")}})
    ds = mmdata.run(document, runner="inline")
    assert (tmp_path / "log").read_text().split() == ["brought", "computed"]
    assert ds.sql("SELECT brought FROM samples ORDER BY row_id").fetchall() == [(3,), (3,), (5,)]
    [settled] = (tmp_path / "dataset" / "state").glob("resolved-brought_by_test-*")
    assert json.loads(settled.read_text())["weights"] == {"net": SHA}
    mmdata.run({**document, "name": "again"}, runner="inline")
    assert (tmp_path / "log").read_text().split() == ["brought", "computed"]
