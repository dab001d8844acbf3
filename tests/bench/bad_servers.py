"""What mmdata and img2dataset 1.47.0 do with everything a server can do, case by case, over the same server.

Run by hand: `python tests/bench/bad_servers.py`; about four minutes, and up to 6 GB of memory for the peer. Both have
4 s for a URL and one retry. mmdata fetches all at once, in one process; img2dataset each case by itself, in a process
that is ended after 40 s, because some of them it never leaves. The outcomes go to tests/bench/results/bad_servers.json,
and the table of docs/fetching.md is made from them (`--docs` makes it alone).
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(FIXTURES))
from misbehaving import Misbehaving  # noqa: E402  found by the line above
from misbehaving_cases import CASES, Case, listing  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "bad_servers.json"
PAGE = ROOT / "docs" / "fetching.md"
BEGIN, END = "<!-- cases -->", "<!-- /cases -->"
TIMEOUT_S, GIVEN_UP_S = 4, 40
LARGE_MB = 300  # memory that is worth a word
LONG_S = 2 * TIMEOUT_S + 4  # so are seconds above two attempts and a pause
ALONE = ("png_bomb", "jpeg_scans", "png_words_bomb")  # nothing else runs beside these: they need a processor


def ours(server: Misbehaving, folder: Path) -> dict[str, Any]:
    """The rows of mmdata by case, and what the whole run cost."""
    import mmdata

    rows = listing(server)
    pq.write_table(pa.table({"url": pa.array([r.url for r in rows], pa.string())}), folder / "list.parquet")
    limits = {c.host: {"connections": c.connections, "per_s": None} for c in CASES if c.connections}
    fetch = {"timeout_s": TIMEOUT_S, "retries": 1, "defer_after_s": 1, "host_limits": limits, "max_bytes": 8 << 20}
    command = [
        sys.executable,
        FIXTURES / "misbehaving_run.py",
        folder / "list.parquet",
        folder / "ds",
        json.dumps(fetch),
    ]
    env = {**os.environ, "SSL_CERT_FILE": str(server.authority)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True, timeout=300)
    found = mmdata.open(folder / "ds").sql("SELECT * FROM samples ORDER BY row_id").arrow().read_all().to_pylist()
    fields = ("status", "status_detail", "attempts", "fetch_ms")
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row, seen in zip(rows, found, strict=True):
        by_case.setdefault(row.case.name if row.case else "good", []).append({f: seen[f] for f in fields})
    assert {s["status"] for s in by_case.pop("good")} == {"ok"}
    asked = {c.name: len(server.hits(c.host)) for c in CASES}
    return {"cases": by_case, "asked": asked, "rows": len(rows), **json.loads(done.stdout.splitlines()[-1])}


def theirs(server: Misbehaving, folder: Path) -> dict[str, Any]:
    """The rows of img2dataset by case, with what it stored looked at."""
    list_of_cases = [{"name": c.name, "urls": c.locations(server), "alone": c.name in ALONE} for c in CASES]
    (folder / "cases.json").write_text(json.dumps(list_of_cases))
    (folder / "hidden").mkdir()
    # As in img2dataset_peer: torch is no part of this, and half of the import.
    (folder / "hidden" / "torch.py").write_text("raise ModuleNotFoundError('no torch here', name='torch')\n")
    env = {
        **os.environ,
        "SSL_CERT_FILE": str(server.authority),
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "PYTHONPATH": f"{folder / 'hidden'}:{FIXTURES}",
    }
    python = ROOT / ".venv-peers" / "bin" / "python"
    command = [str(python), str(FIXTURES / "misbehaving_peer.py"), str(folder / "cases.json"), str(folder / "peer")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True, timeout=1200)
    told = {t["name"]: t for t in map(json.loads, done.stdout.splitlines())}
    for case in CASES:
        for row in told[case.name]["rows"]:
            stored = folder / "peer" / case.name / "00000" / f"{row.pop('key')}.jpg"
            row["message"] = short(row.pop("error_message"))
            row["wrong"] = what_is_wrong(case, stored.read_bytes()) if stored.exists() else None
        told[case.name]["asked"] = len(server.hits(case.host))
    return told


def short(message: str | None) -> str | None:
    """An error message without places of its own machine, cut to a table's width."""
    if message is None:
        return None
    text = "OpenCV error" if message.startswith("OpenCV(") else message.replace("<urlopen error ", "").rstrip(">")
    text = "".join(c for c in text if c.isprintable()).strip().rstrip(":")
    return text if len(text) <= 60 else text[:59] + "…"


def what_is_wrong(case: Case, data: bytes) -> str | None:
    """How a stored picture differs from what is meant; None = it does not."""
    with Image.open(io.BytesIO(data)) as picture:
        if case.size and picture.size != case.size:
            return f"{picture.width} x {picture.height} px instead of {case.size[0]} x {case.size[1]}"
        pixels = picture.convert("RGB")
    for x, y, *colour in case.colours:
        seen = pixels.getpixel((int(x * pixels.width), int(y * pixels.height)))
        assert isinstance(seen, tuple)
        if max(abs(a - b) for a, b in zip(seen, colour, strict=True)) > 4:
            return f"colour {seen} instead of {tuple(colour)}"
    return None


def our_words(case: Case, rows: list[dict[str, Any]]) -> str:
    """The second column."""
    statuses = list(dict.fromkeys(f"`{r['status']}`" for r in rows))
    return ", ".join(statuses) + (f"; {case.note}" if case.note else "")


def their_words(told: dict[str, Any], asked_by_us: int) -> str:
    """The third column."""
    words: list[str] = []
    for row in told["rows"]:
        if row["status"] == "success":
            words.append(f"stored, **wrong**: {row['wrong']}" if row["wrong"] else "stored")
        else:
            words.append(f"failed: {row['message'] or 'no message'}")
    if not words:
        words = [f"**not over after {GIVEN_UP_S} s**" if told["seconds"] >= GIVEN_UP_S else "**no row**"]
    elif told["seconds"] >= LONG_S:
        words.append(f"**{told['seconds']:.0f} s**")
    if told["more_mb"] >= LARGE_MB:
        words.append(f"**{told['more_mb'] / 1000:.1f} GB**")
    if 1 == asked_by_us < told["asked"]:
        words.append(f"asked {told['asked']} times")
    return "; ".join(dict.fromkeys(words)).replace("|", "\\|")


def table(results: dict[str, Any]) -> str:
    """The Markdown table, by groups, with what mmdata's run cost above it."""
    run, group = results["mmdata"], ""
    lines = [f"mmdata's run: {run['rows']} rows in {run['seconds']:.0f} s, at most {run['peak_mb']} MB, no row lost."]
    for case in CASES:
        if case.group != group:
            group = case.group
            lines += ["", f"### {group}", "", "| case | mmdata | img2dataset 1.47.0 |", "|---|---|---|"]
        mine, peer = results["mmdata"]["cases"][case.name], results["img2dataset"][case.name]
        lines.append(
            f"| {case.what} | {our_words(case, mine)} | {their_words(peer, results['mmdata']['asked'][case.name])} |"
        )
    return "\n".join(lines).strip()


def page(text: str, results: dict[str, Any]) -> str:
    """The page with its table made anew."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert all((begin, end)), f"{PAGE.name} has no {BEGIN} … {END}"
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def main() -> int:
    """See the top of this file."""
    if "--docs" not in sys.argv:
        with tempfile.TemporaryDirectory() as name, Misbehaving() as server:
            folder = Path(name)
            results = {"mmdata": ours(server, folder), "timeout_s": TIMEOUT_S, "given_up_s": GIVEN_UP_S}
            server.asked.clear()
            results["img2dataset"] = theirs(server, folder)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        never = [n for n, t in results["img2dataset"].items() if not t["rows"]]
        cost = {k: v for k, v in results["mmdata"].items() if k not in ("cases", "asked")}
        print(f"mmdata: {cost}")
        print(f"img2dataset: {len(never)} of {len(CASES)} cases without a row after {GIVEN_UP_S} s: {', '.join(never)}")
    if PAGE.exists():
        PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
