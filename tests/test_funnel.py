"""The funnel's sums, its table and its picture."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from mmdata.errors import StoreError
from mmdata.funnel import Funnel, FunnelStep, markdown_cell, render, svg

# 1000 rows: 120 fail at ingest, basic drops 380 of 880, score fails 5 of 500, aligned drops 250 of 495
STEPS = (
    FunnelStep(
        0, "ingest", "ingest", 1000, 0, 120, 880, {"http_4xx": 60, "timeout": 30, "dns": 15, "tls": 10, "decode": 5}
    ),
    FunnelStep(1, "basic", "filter", 880, 380, 0, 500, {"basic": 370, "basic:null": 10}),
    FunnelStep(2, "score", "stage", 500, 0, 5, 495, {"not_finite": 5}, 12.34),
    FunnelStep(3, "aligned", "filter", 495, 250, 0, 245, {"aligned": 250}),
)
FUNNEL = Funnel(1000, 245, 630, 125, STEPS)


def _replaced(step: int, **changes: object) -> Funnel:
    steps = [*STEPS]
    steps[step] = FunnelStep(**{**steps[step].__dict__, **changes})  # type: ignore[arg-type]
    return Funnel(1000, 245, 630, 125, tuple(steps))


def _printed(funnel: Funnel, encoding: str = "utf-8", width: int = 110) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    render(funnel, Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_check_accepts_a_funnel_that_adds_up() -> None:
    FUNNEL.check()
    Funnel(0, 0, 0, 0).check()


@pytest.mark.parametrize(
    ("funnel", "words"),
    [
        (Funnel(1000, 245, 630, 124, STEPS), "1000 rows came in, but 245 kept"),
        (_replaced(1, dropped=379), "step 'basic' took in 880 rows"),
        (_replaced(3, rows_in=496, rows_out=246), "step 'score' hands on 495 rows"),
        (_replaced(2, reasons={"not_finite": 4}), "step 'score' lost 5 rows, but gives reasons for 4"),
        (Funnel(1000, 246, 630, 124, STEPS), "the steps add up"),
    ],
)
def test_check_names_the_place_where_a_row_is_lost(funnel: Funnel, words: str) -> None:
    with pytest.raises(StoreError, match=words):
        funnel.check()


def test_to_dict_is_plain_json() -> None:
    read = json.loads(json.dumps(FUNNEL.to_dict()))
    assert (read["rows_in"], read["kept"], read["dropped"], read["failed"]) == (1000, 245, 630, 125)
    assert read["steps"][2] == {
        "position": 2, "name": "score", "kind": "stage", "rows_in": 500, "dropped": 0, "failed": 5,
        "rows_out": 495, "reasons": {"not_finite": 5}, "seconds": 12.34,
    }  # fmt: skip


def test_markdown_has_a_line_a_step_and_the_total() -> None:
    lines = FUNNEL.markdown().splitlines()
    assert len(lines) == 2 + 4 + 1
    assert lines[2].startswith("| ingest | 1,000 | 0 | 120 | 880 | http\\_4xx 60, timeout 30, dns 15")
    assert lines[3] == "| filter basic | 880 | 380 | 0 | 500 | basic 370, basic:null 10 |"
    assert lines[-1] == "| **all** | 1,000 | 630 | 125 | **245** | 24.5 % kept |"
    assert "12.3" not in FUNNEL.markdown()  # times would make the card differ from run to run


def test_foreign_words_stay_inside_their_cell() -> None:
    assert markdown_cell("a|b\n# <img src=x> [x](y) `z`") == "a\\|b \\# &lt;img src=x&gt; \\[x\\](y) \\`z\\`"


def test_picture_shows_every_step_reason_and_the_sum() -> None:
    text = _printed(FUNNEL)
    for word in ("ingest", "filter basic", "score", "http_4xx 60", "others 5", "basic:null 10", "12.3", "24.5 %"):
        assert word in text, word
    assert text.rstrip().splitlines()[-1] == "245 kept of 1,000 rows in (24.5 %) · 630 dropped · 125 failed"


def test_bars_are_as_long_as_their_rows() -> None:
    """30 cells are 1000 rows: basic takes in 880 (26 cells), of which 380 leave (11), so 15 stay."""
    line = next(x for x in _printed(FUNNEL, "ascii").splitlines() if "filter basic" in x)
    assert (line.count("#"), line.count("-"), line.count("x")) == (15, 11, 0)
    line = next(x for x in _printed(FUNNEL, "ascii").splitlines() if "score" in x)
    assert (line.count("#"), line.count("x")) == (14, 1)  # five lost rows are less than a cell, and still seen


def test_picture_prints_where_only_ascii_can_be() -> None:
    assert "245 kept of 1,000" in _printed(FUNNEL, "ascii")


def test_markup_in_a_name_is_shown_not_obeyed() -> None:
    step = FunnelStep(0, "[red]x[/red]", "ingest", 3, 0, 3, 0, {"[bold]y": 3})
    text = _printed(Funnel(3, 0, 0, 3, (step,)))
    assert "[red]x[/red]" in text
    assert "[bold]y" in text


def test_no_rows_is_no_division_by_zero() -> None:
    step = FunnelStep(0, "ingest", "ingest", 0, 0, 0, 0, {})
    assert "0 kept of 0 rows in" in _printed(Funnel(0, 0, 0, 0, (step,)))


def test_svg_is_reproducible_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = svg(FUNNEL)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "dumb")
    assert svg(FUNNEL) == first
    root = ElementTree.fromstring(first)
    words = "".join(root.itertext()).replace("\xa0", " ")
    assert "245 kept" in words
    assert "url(http" not in first
    assert "@font-face" not in first
