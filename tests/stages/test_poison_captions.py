"""Captions nobody would write, through every operator that reads one: none raises, none takes long, NULL stays NULL.

The operators are those of the registry, with the options of `every_operator`: a new one that reads a caption is in
here by itself. Time is bounded generously, far above what a batch takes, and far below what a quadratic step would.
"""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from typing import Any

import every_operator as every
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import make_batch, noise, png
from held_rows import compute as compute_group
from tiny_clip import save_tiny_clip

import mmdata
from mmdata.errors import RecipeError
from mmdata.isolate import StepTracker, compute_rows
from mmdata.plan import plan_recipe
from mmdata.recipe import parse
from mmdata.stage import Failed, Group

POISON: dict[str, str] = {
    "empty": "",
    "white space": " \t\n\u00a0\u2003\u3000 ",
    "Arabic": "دراجة حمراء تستند إلى جدار منزل قديم",
    "Chinese": "一辆红色的自行车靠在老房子的墙上",
    "Thai": "จักรยานสีแดงพิงกำแพงบ้านเก่า",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🐈" * 20,
    "combining marks": "Z" + "\u0351\u0310\u0306" * 300 + "algo",
    "right to left marks": "\u202eevil\u202c \u2066x\u2069 \ufeff",
    "control characters": "\x00\x01\x07\x1b[31mred\x1b[0m\r\n\x7f\u0085",
    "not characters": "\ufffe\uffff\U0010ffff\U0001fffe\ue000",
    "HTML": "<script>alert('x')</script><img src=x onerror=alert(1)>&amp;&#x41;",
    "SQL": "'; DROP TABLE samples; -- \" OR 1=1 /*",
    "format strings": "%s %n %d {0} {__class__} ${jndi:x} $(rm) `id` {{7*7}} \\x00 \\",
    "paths": "../../../../etc/passwd\\..\\..",
    "a pattern that backtracks": "a" * 3_000 + "!" + "(a+)+$" * 50 + "a@" * 1_500,
    "marks alone": "!?.,;:@#-" * 500,
    "digits": "1" * 3_000 + " " + "1.2.3.4:" * 400,
    "a long word": "Donaudampfschiffahrt" * 1_000,
    "nothing but brackets": "([{<" * 1_000,
}
TEN_MB = {
    "words": "a red bicycle " * 750_000,
    "one word": "x" * 10_000_000,
    "emoji": "🐈" * 2_500_000,
    "combining marks": "é" + "\u0301" * 5_000_000,
}
SECONDS = 30  # for one operator and one batch, on a machine that is busy
TEXT_STAGES = [n for n in every.STAGES if "caption" in every.first_contract(n).reads]
# Opening it takes half a minute on a busy machine, and its texts go through embed_text's encoder.
NAMED = [pytest.param(n, marks=pytest.mark.long) if n == "score_conse" else n for n in TEXT_STAGES]
TEXT_GROUPS = [n for n in every.GROUPS if "caption" in every.first_contract(n).reads]


def batch_of(name: str, captions: list[str | None]) -> Any:
    contract = every.bound(name)[1]
    rows = len(captions)
    others = [c for c in contract.reads if c not in ("image", "caption")]
    columns = {c: every.COLUMNS[c].take(pa.array([0] * rows)) for c in others}
    columns["caption"] = pa.array(captions, pa.string())
    pictures = [noise(24, 24, 0)] * rows if "image" in contract.reads else None
    return make_batch(pictures, **columns)


def answers(name: str, captions: list[str | None]) -> list[Any]:
    """What the stage says of each caption, as the runner asks; in less than `SECONDS`."""
    stage, contract = every.opened(name, 4 if name in every.MODEL_STAGES else None)
    start = time.monotonic()
    found = compute_rows(stage, contract, batch_of(name, captions), StepTracker(name))
    assert time.monotonic() - start < SECONDS
    return found


def plain(answer: Any) -> dict[str, Any]:
    """A row's cells as values that can be compared."""
    assert not isinstance(answer, Failed)
    return {column: getattr(value, "tolist", lambda value=value: value)() for column, value in answer.items()}


def test_what_is_tested_here():
    assert {"probe_text", "detect_language", "score_clip", "tag_text", "scrub_pii", "match_labels"} <= set(TEXT_STAGES)
    assert {"rare_ngrams"} <= set(TEXT_GROUPS)


@pytest.mark.parametrize("name", TEXT_STAGES)
@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.string()), pa.binary()])
def test_a_column_that_holds_no_text_is_told_before_anything_runs(name: str, kind: pa.DataType):
    stage, contract = every.bound(name)
    fields = {c: every.COLUMNS[c].type for c in contract.reads if c not in ("image", "caption")}
    type(stage).check_types(stage.options, pa.schema({**fields, "caption": pa.string()}))
    with pytest.raises(RecipeError, match=r"column names column 'caption', which is .*; expected text"):
        type(stage).check_types(stage.options, pa.schema({**fields, "caption": kind}))


def test_a_column_that_is_not_read_need_not_be_there(tmp_path: Path):
    pq.write_table(pa.table({"url": ["http://127.0.0.1/a.png"]}), tmp_path / "list.parquet")
    source = {"kind": "urls", "path": str(tmp_path / "list.parquet"), "url": "url", "caption": None}
    steps = [{"detect_text": {"read": False}}]
    [step] = plan_recipe(parse({"name": "x", "dataset": "x", "source": source, "steps": steps})).steps
    assert step.contract is not None
    assert "caption" not in step.contract.reads


@pytest.mark.parametrize("name", NAMED)
def test_no_caption_is_a_failure(name: str):
    captions = ["a red bicycle", *POISON.values(), None, "a red bicycle"]
    found = answers(name, captions)
    assert [c for c, answer in zip(captions, found, strict=True) if isinstance(answer, Failed)] == []
    assert plain(found[0]) == plain(found[-1])  # what stands between changed nothing


@pytest.mark.parametrize("name", NAMED)
def test_a_missing_caption_has_no_values(name: str):
    """Whatever is told from the caption is NULL: what is not is told from the picture, whatever its caption."""
    found = [plain(answer) for answer in answers(name, [None, "a red bicycle", "two dogs"])]
    told = {
        column for column in found[0] if found[0][column] != found[1][column] or found[0][column] != found[2][column]
    }
    assert told
    assert {column: found[0][column] for column in told} == dict.fromkeys(told)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", [k if k == "words" else pytest.param(k, marks=pytest.mark.long) for k in TEN_MB])
def test_ten_megabytes_take_bounded_time(name: str, kind: str):
    [answer] = answers(name, [TEN_MB[kind]])
    assert not isinstance(answer, Failed)


@pytest.mark.parametrize("name", TEXT_GROUPS)
def test_groups_take_any_caption(name: str, tmp_path: Path):
    group, contract = every.bound(name)
    assert isinstance(group, Group)
    captions = [*POISON.values(), None, *TEN_MB.values(), "a red bicycle"]
    batch = batch_of(name, captions)
    start = time.monotonic()
    answer = compute_group(group, batch.table, tmp_path)
    assert time.monotonic() - start < SECONDS
    assert sorted(answer) == sorted(contract.writes.names)
    assert {len(values) for values in answer.values()} == {len(captions)}


def test_a_missing_caption_is_never_kept_by_an_alignment_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Poison through a whole run. A filter that every cosine passes drops the row without one, and says why."""
    monkeypatch.chdir(tmp_path)
    # A tar's text is UTF-8 as it is; what the reader takes for no caption at all is the row without a member.
    captions: dict[str, str | None] = {"none": None, **{f"k{i}": text for i, text in enumerate(POISON.values())}}
    with tarfile.open("00000.tar", "w") as tar:
        for number, (key, text) in enumerate(captions.items()):
            members = {"png": png(noise(32, 32, number))} | ({} if text is None else {"txt": text.encode()})
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    recipe = {
        "name": "poison",
        "dataset": "poison",
        "source": {"kind": "webdataset", "path": "00000.tar"},
        "steps": [
            "probe_text",
            "detect_language",
            {"score_clip": {"model": save_tiny_clip(tmp_path / "clip")}},
            {"filter": {"aligned": "clip_score >= -1"}},
        ],
    }
    ds = mmdata.run(recipe, runner="inline")
    found = ds.sql("SELECT key, verdict, reason, caption, text_char_count FROM samples ORDER BY row_id").fetchall()
    assert len(found) == len(captions)
    by_key = {key: (verdict, reason) for key, verdict, reason, _, _ in found}
    assert by_key.pop("none") == ("dropped", "aligned:null")
    assert set(by_key.values()) == {("kept", None)}
    for key, _, _, caption, count in found:
        assert caption == captions[key]
        assert count == (None if caption is None else len(caption))
