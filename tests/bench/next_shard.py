"""How long a model waits between two shards, with the next one made ready beside it and without.

Run by hand: `python tests/bench/next_shard.py`. The model is a wait of 60 ms a batch of 16, which leaves the CPUs free
as a GPU does; before it photographs of 640 × 480 px are read, decoded and scaled to 224 px on two threads. Shards are
short (64 rows), so that there are many boundaries. Idle is the time from the end of a shard's last batch to the begin
of the next shard's first, by the stage's own clock, over all boundaries of a run; without = the same code, with the
driver's hint of what comes next (`Item.then`) left out. On disk, and on an S3-protocol server that answers 0.2 s late;
in this process, and in one worker process. Rounds alternate; the figure is the median of the rounds' ratios, which go
to tests/bench/results/next_shard.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))
import synthetic
from faulty_proxy import FaultyProxy
from s3 import in_environment, running_s3

import mmdata
from mmdata import feed, registry
from mmdata.stage import Contract, Needs, Options, Pixels, Stage, parse_schema

RESULTS = Path(__file__).parent / "results" / "next_shard.json"
SHARD_ROWS, BATCH, MODEL_S = 64, 16, 0.06


def photograph(number: int) -> bytes:
    """A JPEG of 640 × 480 px, different for every number."""
    small = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


class WaitOptions(Options):
    log: str = Field(description="file that gets a line of JSON a batch: its numbers' first, begin and end in s")
    number: int = Field(0, description="the round: another one is another column set")


class WaitAsAModel(Stage[WaitOptions]):
    """waited = the mean of the picture, after as long as a model on an accelerator would take."""

    name, label = "wait_as_a_model", "waited"

    @classmethod
    def contract(cls, options: WaitOptions) -> Contract:
        return Contract(
            writes=parse_schema("waited: float32"),
            reads=("number", "image"),
            pixels=(Pixels(224),),
            batch_shape=BATCH,
            needs=Needs(threads=2),
        )

    def open(self, device: str) -> None:
        self.log = Path(self.options.log).open("a", encoding="utf-8")

    def compute(self, batch: Any) -> Mapping[str, Sequence[Any]]:
        means = [float(p.mean()) for p in batch.pixels(Pixels(224))]
        begin = time.monotonic()
        time.sleep(MODEL_S)
        self.log.write(json.dumps([batch["number"][0], begin, time.monotonic()]) + "\n")
        self.log.flush()
        return {"waited": means}

    def close(self) -> None:
        self.log.close()


@contextmanager
def _no_hints() -> Iterator[None]:
    with patch.object(feed._Kept, "follow", lambda *_: None):
        yield


def _idle_s(log: Path) -> list[float]:
    """Seconds between the last batch of a shard and the first of the next, for each boundary."""
    batches = sorted((begin, end, number // SHARD_ROWS) for number, begin, end in map(json.loads, log.open()))
    return [b[0] - a[1] for a, b in pairwise(batches) if a[2] != b[2]]


def measure(document: dict[str, Any], folder: Path, runner: Any, rounds: int) -> dict[str, Any]:
    """Idle milliseconds a boundary and whole seconds of the batches, with and without, and the ratio."""
    idle: dict[str, list[float]] = {"with": [], "without": []}
    whole: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(rounds + 1):  # the first one warms up
        for how in ("with", "without") if number % 2 else ("without", "with"):
            log = folder / f"{runner}-{how}-{number}-{time.monotonic_ns()}"
            step = {"wait_as_a_model": {"log": str(log), "number": time.monotonic_ns()}}
            with ExitStack() as stack:
                if how == "without":
                    stack.enter_context(_no_hints())
                mmdata.run({**document, "steps": [step]}, runner=runner, workers=1, quiet=True)
            if number:
                found = [json.loads(line) for line in log.open()]
                idle[how].append(1000 * statistics.mean(_idle_s(log)))
                whole[how].append(max(end for *_, end in found) - min(begin for _, begin, _ in found))
    ratios = [b / a for a, b in zip(idle["with"], idle["without"], strict=True)]
    return {
        "idle_ms_with": [round(v, 1) for v in idle["with"]],
        "idle_ms_without": [round(v, 1) for v in idle["without"]],
        "whole_s_with": round(statistics.median(whole["with"]), 2),
        "whole_s_without": round(statistics.median(whole["without"]), 2),
        "idle_ratio": round(statistics.median(ratios), 2),
    }


def main() -> int:
    """Prints a line a case; 1 where the model waits as long with it as without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    registry.register(WaitAsAModel)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, running_s3() as server, patch.dict(os.environ):
        folder = Path(temporary)
        os.environ["MMDATA_SCRATCH"] = str(folder / "scratch")
        document = synthetic.make_dataset(
            folder / "data", list(range(asked.shards * SHARD_ROWS)), shard_rows=SHARD_ROWS, picture=photograph
        )
        bucket = server.bucket()
        for path in sorted((folder / "data" / "dataset").rglob("*")):
            if path.is_file():
                key = f"pets/{path.relative_to(folder / 'data' / 'dataset')}"
                server.client().upload_file(str(path), bucket, key)
        with FaultyProxy(server.port, rates={"slow": 1.0}) as proxy:
            stored = {"disk": document, "late store": {**document, "dataset": f"s3://{bucket}/pets"}}
            fixtures = Path(synthetic.__file__).parent
            os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(fixtures)])
            with in_environment(server.environment(proxy)):
                for place, where in stored.items():
                    for runner in ("inline", "processes"):
                        found = measure(where, folder, runner, asked.rounds)
                        figures[f"{place}, {runner}"] = found
                        print(f"{place}, {runner}: {found}", flush=True)
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    RESULTS.write_text(json.dumps({"machine": machine, "shards": asked.shards, **figures}, indent=2) + "\n")
    return 0 if all(f["idle_ratio"] > 1 for f in figures.values()) else 1


if __name__ == "__main__":
    import next_shard  # worker processes look for the stage there, not in `__main__`

    raise SystemExit(next_shard.main())
