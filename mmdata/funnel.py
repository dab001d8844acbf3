"""The funnel: what became of every input row, step by step, as numbers, a Markdown table and a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from mmdata.errors import StoreError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

__all__ = ["Funnel", "FunnelStep", "markdown_cell", "render", "svg"]

_BAR_CELLS = 30
_BAR_CELLS_NARROW = 14  # on a terminal below 100 columns, where names and reasons need the room
_SVG_COLUMNS = 118
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_REASONS_SHOWN = 4


@dataclass(frozen=True)
class FunnelStep:
    """One step of the funnel. `rows_in` = `rows_out` + `dropped` + `failed`, in rows.

    `position` 0 is ingest, steps count from 1 as in the recipe. `reasons`: reason → rows, of the dropped and the
    failed together. `seconds`: work of this step summed over workers; None = not known (nothing was computed).
    """

    position: int
    name: str
    kind: Literal["ingest", "stage", "group", "attach", "filter"]
    rows_in: int
    dropped: int
    failed: int
    rows_out: int
    reasons: dict[str, int]
    seconds: float | None = None


@dataclass(frozen=True)
class Funnel:
    """Rows in = kept + dropped + failed; `check` proves it, for the whole and for every step."""

    rows_in: int
    kept: int
    dropped: int
    failed: int
    steps: tuple[FunnelStep, ...] = ()

    def check(self) -> None:
        """StoreError when a row is lost or counted twice, with the step where the sum breaks."""
        if self.rows_in != self.kept + self.dropped + self.failed:
            raise StoreError(
                f"{self.rows_in} rows came in, but {self.kept} kept + {self.dropped} dropped + {self.failed} failed "
                f"= {self.kept + self.dropped + self.failed}; the ledger is damaged, run the recipe again"
            )
        for step in self.steps:
            _check_step(step)
        if not self.steps:
            return
        for before, after in pairwise(self.steps):
            if before.rows_out != after.rows_in:
                raise StoreError(
                    f"step {before.name!r} hands on {before.rows_out} rows, but step {after.name!r} takes in "
                    f"{after.rows_in}; the ledger is damaged, run the recipe again"
                )
        found = (
            self.steps[0].rows_in,
            self.steps[-1].rows_out,
            sum(s.dropped for s in self.steps),
            sum(s.failed for s in self.steps),
        )
        if found != (self.rows_in, self.kept, self.dropped, self.failed):
            raise StoreError(
                f"the steps add up to (in, kept, dropped, failed) = {found}, the ledger to "
                f"{(self.rows_in, self.kept, self.dropped, self.failed)}; it is damaged, run the recipe again"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return {**asdict(self), "steps": [asdict(s) for s in self.steps]}

    def markdown(self) -> str:
        """A Markdown table, one line a step and one for the total; without seconds, so that it is reproducible."""
        lines = ["| step | rows in | dropped | failed | rows out | why |", "|---|--:|--:|--:|--:|---|"]
        for s in self.steps:
            why = ", ".join(f"{markdown_cell(reason)} {count:,}" for reason, count in _by_count(s.reasons))
            name = markdown_cell(_label(s))
            lines.append(f"| {name} | {s.rows_in:,} | {s.dropped:,} | {s.failed:,} | {s.rows_out:,} | {why} |")
        lines.append(
            f"| **all** | {self.rows_in:,} | {self.dropped:,} | {self.failed:,} | **{self.kept:,}** | "
            f"{_share(self.kept, self.rows_in)} kept |"
        )
        return "\n".join(lines) + "\n"


def _check_step(step: FunnelStep) -> None:
    if step.rows_in != step.rows_out + step.dropped + step.failed:
        raise StoreError(
            f"step {step.name!r} took in {step.rows_in} rows, but {step.rows_out} went on + {step.dropped} dropped + "
            f"{step.failed} failed; the ledger is damaged, run the recipe again"
        )
    if step.reasons and sum(step.reasons.values()) != step.dropped + step.failed:
        raise StoreError(
            f"step {step.name!r} lost {step.dropped + step.failed} rows, but gives reasons for "
            f"{sum(step.reasons.values())}; the ledger is damaged, run the recipe again"
        )


def _label(step: FunnelStep) -> str:
    return f"{step.kind} {step.name}" if step.kind in ("filter", "group") else step.name


def _by_count(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def markdown_cell(text: str) -> str:
    """Foreign text as plain words of one line: no Markdown, no HTML, no new table cell."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*_\[\]#])", r"\\\1", flat)


def render(funnel: Funnel, console: Console) -> None:
    """Print the funnel: one bar a step (green = goes on, yellow = dropped, red = failed; the full width = rows in)."""
    from rich.text import Text

    ascii_only = console.options.ascii_only
    console.print(_picture(funnel, ascii_only, _BAR_CELLS if console.width >= 100 else _BAR_CELLS_NARROW))
    dot = "-" if ascii_only else "·"
    total = Text.assemble(
        (f"{funnel.kept:,} kept", "bold green"),
        f" of {funnel.rows_in:,} rows in ({_share(funnel.kept, funnel.rows_in)}) {dot} ",
        (f"{funnel.dropped:,} dropped", "yellow"),
        f" {dot} ",
        (f"{funnel.failed:,} failed", "red"),
    )
    console.print(total)


def _picture(funnel: Funnel, ascii_only: bool, bar_cells: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ASCII if ascii_only else box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("step", overflow="fold", min_width=min(16, max((len(_label(s)) for s in funnel.steps), default=8)))
    table.add_column("", no_wrap=True, width=bar_cells)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column("why the others left", overflow="fold", ratio=1)
    table.add_column("seconds", justify="right", no_wrap=True)
    for step in funnel.steps:
        seconds = "" if step.seconds is None else f"{step.seconds:,.1f}"
        share = _share(step.rows_out, funnel.rows_in)
        bar = _bar(step, funnel.rows_in, ascii_only, bar_cells)
        # Text(), not a plain string: a step's name or a reason may hold rich's own markup
        table.add_row(Text(_label(step)), bar, f"{step.rows_out:,}", share, _why(step, ascii_only), seconds)
    return table


def _bar(step: FunnelStep, whole: int, ascii_only: bool, width: int) -> Text:
    """Kept, then dropped, then failed of this step; a loss too small for a cell is still seen as one cell."""
    from rich.text import Text

    def cells(rows: int) -> int:
        return max(1, round(width * rows / whole)) if rows and whole else 0

    if not whole:
        return Text("")
    dropped, failed = cells(step.dropped), cells(step.failed)
    room = max(0, round(width * step.rows_in / whole) - dropped - failed)
    eighths = min(round(8 * width * step.rows_out / whole), 8 * room)
    if not dropped and not failed:
        kept = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    else:
        kept = "█" * round(eighths / 8)  # whole cells, so that the colours touch
    kept = kept or ("▏" if step.rows_out else "")
    if ascii_only:
        return Text("#" * len(kept) + "-" * dropped + "x" * failed)
    return Text.assemble((kept, "green"), ("█" * dropped, "yellow"), ("█" * failed, "red"))


def _why(step: FunnelStep, ascii_only: bool) -> Text:
    from rich.text import Text

    ordered = _by_count(step.reasons)
    shown = [f"{reason} {count:,}" for reason, count in ordered[:_REASONS_SHOWN]]
    rest = ordered[_REASONS_SHOWN:]
    if rest:
        shown.append(f"others {sum(count for _, count in rest):,}")
    return Text((", " if ascii_only else " · ").join(shown), style="dim" if shown else "")


def svg(funnel: Funnel) -> str:
    """The picture as SVG; the same funnel gives the same bytes, whatever the terminal, and loads nothing from afar."""
    from rich.console import Console

    console = Console(
        record=True,
        file=io.StringIO(),
        width=_SVG_COLUMNS,
        force_terminal=True,
        force_jupyter=False,
        color_system="truecolor",
        no_color=False,
        legacy_windows=False,
    )
    console._environ = {}  # COLUMNS and LINES of the caller's terminal must not matter
    # Through `encoding`, rich asks the file; a StringIO has none and counts as UTF-8.
    render(funnel, console)
    picture = console.export_svg(title="mmdata show", unique_id="mmdata-funnel")
    return re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL)
