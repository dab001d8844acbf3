"""`mmdata download` beside img2dataset: images per second, CPU per image, memory, and where our CPU time goes.

Run by hand: `python tests/bench/fetch.py FOLDER [PART …]`; FOLDER keeps the corpora of photographs.py (made when they
are not there, 1 GB). Parts: a, b, exact (whole commands, start-up included, ours and theirs by turns), bare (decode,
resize, encode and sha256 of the same files in two plain loops at once), steps (CPU of each of these, ours and the
peer's way), only (fetching alone), psnr (of decode: fast),
memory (10,000 and 200,000 rows). Without a part: all but memory, which takes half an hour. It ends with 1 where a
target is not met.

One nginx worker on loopback serves the files; both tools have 2 processes, keep_ratio 256, JPEG at quality 95, sha256
and write WebDataset. Ours keeps robots.txt, address checks (loopback allowed), sniffing and every limit; only the one
host's allowance is lifted. The peer has the best thread_count of 32, 64, 128. Medians go to results/fetch.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent))
import photographs
from loopback import Measured, measured, nginx

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "fetch.json"
PEER = ROOT / ".venv-peers" / "bin" / "img2dataset"
SIZE, QUALITY, PROCESSES = 256, 95, 2
_SCRATCH = tempfile.TemporaryDirectory(prefix="bench-")  # gone with this process
PARTS = ("a", "b", "exact", "bare", "steps", "only", "psnr", "memory")
# (where it stands in the results, at least, at most)
TARGETS: list[tuple[tuple[str, ...], float | None, float | None]] = [
    (("a", "ratio", "images_per_s"), 2.0, None),
    (("a", "ratio", "cpu_per_image"), None, 0.5),
    (("b", "ratio", "images_per_s"), 2.0, None),
    (("exact", "ratio", "images_per_s"), 1.5, None),
    (("cpu_over_bare", "a"), None, 1.3),
    (("only", "bodies_per_cpu_s"), 2500, None),
    (("psnr", "percentile_5_db"), 33, None),
    (("psnr", "median_db"), 45, None),
    (("memory", "largest_process_mb_at_200000"), None, 500),
]


def listing(folder: Path, url: str, corpus: str, rows: int) -> Path:
    """A Parquet list of `rows` distinct URLs over the corpus's files, in turn."""
    names = sorted(p.name for p in (folder / corpus).glob("*.jpg"))
    urls = [f"{url}/{corpus}/{names[n % len(names)]}?i={n}" for n in range(rows)]
    path = Path(tempfile.mkdtemp(dir=_SCRATCH.name)) / "list.parquet"
    pq.write_table(pa.table({"url": urls}), path)
    return path


def theirs(path: Path, out: Path, rows: int, shard_rows: int, threads: int) -> Measured:
    """img2dataset's command. It never needs torch, which its environment here has for another package: hidden."""
    hidden = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    (hidden / "torch.py").write_text("raise ModuleNotFoundError('no torch here', name='torch')\n", encoding="utf-8")
    options = {
        "url_list": path,
        "output_folder": out,
        "input_format": "parquet",
        "output_format": "webdataset",
        "processes_count": PROCESSES,
        "thread_count": threads,
        "image_size": SIZE,
        "resize_mode": "keep_ratio",
        "encode_quality": QUALITY,
        "number_sample_per_shard": shard_rows,
        "compute_hash": "sha256",
    }
    environment = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(hidden)}
    done = measured([str(PEER), *(f"--{name}={value}" for name, value in options.items())], environment)
    return checked(done, out, rows)


def ours(path: Path, out: Path, rows: int, shard_rows: int, **options: Any) -> Measured:
    """`mmdata download` with the same options."""
    asked = {
        "input_format": "parquet",
        "output_folder": out,
        "output_format": "webdataset",
        "processes_count": PROCESSES,
        "image_size": SIZE,
        "resize_mode": "keep_ratio",
        "encode_quality": QUALITY,
        "number_sample_per_shard": shard_rows,
        "allow_private": True,
        "host_limits": '{"127.0.0.1": {"connections": null, "per_s": null}}',
        **options,
    }
    command = [str(Path(sys.executable).parent / "mmdata"), "download", str(path)]
    done = measured([*command, *(f"--{name}={value}" for name, value in asked.items())])
    return checked(done, out, rows)


def checked(done: Measured, out: Path, rows: int) -> Measured:
    """Every row must have been a success, or the figure says nothing."""
    stats = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(out.glob("*_stats.json"))]
    counted = sum(s["successes"] for s in stats)
    if done.exit_code or counted != rows:
        raise SystemExit(f"{counted} of {rows} rows succeeded, exit code {done.exit_code}\n{done.output[-3000:]}")
    shutil.rmtree(out)
    return done


def figures(runs: list[Measured], rows: int) -> dict[str, Any]:
    """Medians of one tool's runs."""
    return {
        "images_per_s": round(rows / statistics.median(r.seconds for r in runs), 1),
        "cpu_ms_per_image": round(1000 * statistics.median(r.cpu_s for r in runs) / rows, 2),
        "largest_process_mb": round(max(r.largest_mb for r in runs)),
        "runs_images_per_s": [round(rows / r.seconds, 1) for r in runs],
    }


def ratios(mine: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs."""
    return {
        "images_per_s": round(mine["images_per_s"] / peer["images_per_s"], 2),
        "cpu_per_image": round(mine["cpu_ms_per_image"] / peer["cpu_ms_per_image"], 2),
    }


def beside(folder: Path, corpus: str, rows: int, shard_rows: int, rounds: int, **options: Any) -> dict[str, Any]:
    """Both commands by turns over the same list."""
    with nginx(folder) as url, tempfile.TemporaryDirectory() as scratch:
        path = listing(folder, url, corpus, rows)
        some = listing(folder, url, corpus, max(rows // 5, 1000))
        few = pq.read_metadata(some).num_rows
        tried = {t: theirs(some, Path(scratch, f"try{t}"), few, shard_rows, t).seconds for t in (32, 64, 128)}
        threads = min(tried, key=lambda t: tried[t])
        mine, peer = [], []
        for number in range(rounds):
            mine.append(ours(path, Path(scratch, f"ours{number}"), rows, shard_rows, **options))
            print(f"  ours   {rows / mine[-1].seconds:.0f} images/s, {1000 * mine[-1].cpu_s / rows:.2f} ms", flush=True)
            peer.append(theirs(path, Path(scratch, f"theirs{number}"), rows, shard_rows, threads))
            print(f"  theirs {rows / peer[-1].seconds:.0f} images/s, {1000 * peer[-1].cpu_s / rows:.2f} ms", flush=True)
    found = {"rows": rows, "mmdata": figures(mine, rows), "img2dataset": figures(peer, rows), "peer_threads": threads}
    return {**found, "ratio": ratios(found["mmdata"], found["img2dataset"])}


def scaled(short: int) -> int | None:
    """Short side to ask of a DCT-scaled decode: of 1/2, 1/4, 1/8 the smallest that is 1.5 times the target or more."""
    return next((-(-short // f) for f in (8, 4, 2) if short >= f * 1.5 * SIZE), None)


def _bare_loop(paths: list[Path], is_scaled: bool) -> float:
    import hashlib

    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    began = time.process_time()
    for path in paths:
        data = path.read_bytes()
        hashlib.sha256(data).hexdigest()
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        least = scaled(min(height, width)) if is_scaled else None
        picture = simplejpeg.decode_jpeg(data, "BGR", min_height=least or 0, min_width=least or 0)
        scale = SIZE / min(picture.shape[:2])
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4)
        cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return time.process_time() - began


def bare(folder: Path, corpus: str, is_scaled: bool = True) -> float:
    """CPU milliseconds per image of what no tool can leave out: a plain loop over the files of the corpus.

    As many loops at once as the tools have processes: two threads of one core are slower than one.
    """
    paths = sorted((folder / corpus).glob("*.jpg"))
    with ProcessPoolExecutor(PROCESSES) as pool:
        parts = [paths[n::PROCESSES] for n in range(PROCESSES)]
        spent = sum(pool.map(_bare_loop, parts, [is_scaled] * PROCESSES))
    return 1000 * spent / len(paths)


def _step_times(paths: list[Path]) -> dict[str, float]:
    import hashlib

    import cv2
    import simplejpeg

    from mmdata.media.resizing import resize

    cv2.setNumThreads(1)
    spent: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        began = time.process_time()
        made = work()
        spent[name] = spent.get(name, 0.0) + time.process_time() - began
        return made

    for path in paths:
        data = path.read_bytes()
        timed("sha256", lambda d=data: hashlib.sha256(d).hexdigest())
        timed("decode, peer (cv2)", lambda d=data: cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_UNCHANGED))
        full = timed("decode, exact (simplejpeg)", lambda d=data: simplejpeg.decode_jpeg(d, "BGR"))
        least = scaled(min(full.shape[:2])) or 0
        small = timed(
            "decode, fast", lambda d=data, n=least: simplejpeg.decode_jpeg(d, "BGR", min_height=n, min_width=n)
        )
        scale = SIZE / min(full.shape[:2])
        size = (round(full.shape[1] * scale), round(full.shape[0] * scale))
        kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4
        shrunk = timed("resize, exact and peer", lambda f=full, z=size, k=kind: cv2.resize(f, z, interpolation=k))
        timed("resize, fast", lambda f=small: resize(f, SIZE, "keep_ratio", quick=True))
        timed("encode", lambda f=shrunk: cv2.imencode(".jpg", f, [cv2.IMWRITE_JPEG_QUALITY, QUALITY]))
    return spent


def steps(folder: Path) -> dict[str, float]:
    """CPU milliseconds per image of A for each step, two processes at once."""
    paths = sorted((folder / "A").glob("*.jpg"))[::4]
    with ProcessPoolExecutor(PROCESSES) as pool:
        parts = list(pool.map(_step_times, [paths[n::PROCESSES] for n in range(PROCESSES)]))
    return {name: round(1000 * sum(part[name] for part in parts) / len(paths), 2) for name in parts[0]}


def psnr(folder: Path, corpus: str = "A") -> dict[str, float]:
    """Of what `decode: fast` stores, here as png, against libjpeg's full decode and INTER_AREA, in dB."""
    import cv2

    from mmdata.prepare import prepare
    from mmdata.settings import FetchOptions

    fetch, found = FetchOptions(image_size=SIZE, encode_format="png", encode_quality=1), []
    for path in sorted((folder / corpus).glob("*.jpg")):
        data = path.read_bytes()
        full = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if min(full.shape[:2]) <= SIZE:
            continue
        stored = prepare(data, fetch).data
        assert stored is not None, path
        fast = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_COLOR)
        want = cv2.resize(full, (fast.shape[1], fast.shape[0]), interpolation=cv2.INTER_AREA)
        error = float(np.mean((fast.astype(np.float64) - want) ** 2))
        found.append(10 * np.log10(255**2 / error) if error else 99.0)
    low, middle = np.percentile(found, [5, 50])
    return {"pictures": len(found), "percentile_5_db": round(float(low), 1), "median_db": round(float(middle), 1)}


_ONLY = """
import asyncio, json, resource, sys, time
from mmdata.fetcher import ToFetch, fetch_all
from mmdata.host_gate import own_gate
from mmdata.settings import FetchOptions

urls = open(sys.argv[1]).read().split()
limits = {"127.0.0.1": {"connections": None, "per_s": None}}
fetch = FetchOptions(allow_private=True, host_limits=limits, media="any", concurrency=int(sys.argv[2]))
size = 0
async def deliver(index, fetched):
    global size
    assert fetched.status == "ok", fetched
    size += len(fetched.data)
before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
asyncio.run(fetch_all([ToFetch(i, u) for i, u in enumerate(urls)], fetch, own_gate(fetch)(), deliver))
after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"bodies_per_s": round(len(urls) / seconds), "bodies_per_cpu_s": round(len(urls) / cpu),
                  "cpu_ms_per_body": round(1000 * cpu / len(urls), 3), "mean_body_bytes": size // len(urls),
                  "concurrency": int(sys.argv[2])}))
"""


def only(folder: Path, rows: int, concurrency: int = 64) -> dict[str, Any]:
    """Fetching alone, in one process: every check and limit, no decoding and nothing written."""
    with nginx(folder) as url:
        path = listing(folder, url, "A", rows)
        text = path.with_suffix(".txt")
        text.write_text("\n".join(pq.read_table(path).column("url").to_pylist()), encoding="utf-8")
        done = measured([sys.executable, "-c", _ONLY, str(text), str(concurrency)])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    return found


def memory(folder: Path, sizes: tuple[int, ...] = (10_000, 200_000)) -> dict[str, Any]:
    """Peak memory of our largest process over so many rows of A, in shards of 5,000."""
    found = {}
    with nginx(folder) as url, tempfile.TemporaryDirectory() as scratch:
        for rows in sizes:
            path = listing(folder, url, "A", rows)
            found[f"largest_process_mb_at_{rows}"] = round(ours(path, Path(scratch, "out"), rows, 5000).largest_mb)
    return found


def measure(part: str, folder: Path, rows: int, rounds: int) -> Any:
    """One part's figures."""
    if part == "a":
        return beside(folder, "A", rows, 10_000, rounds)
    if part == "exact":
        return beside(folder, "A", rows, 10_000, rounds, decode="exact")
    if part == "b":
        return beside(folder, "B", max(rows // 5, 1000), 1000, rounds)
    if part == "bare":
        return {f"{c}_cpu_ms_per_image": round(bare(folder, c), 2) for c in "AB"}
    if part == "only":
        return max((only(folder, rows) for _ in range(rounds)), key=lambda f: f["bodies_per_cpu_s"])
    return {"psnr": psnr, "steps": steps, "memory": memory}[part](folder)


def keep(part: str, found: Any) -> None:
    """Write one part's figures; the others' stay."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known["machine"] = {"cpus": os.cpu_count(), "img2dataset": "1.47.0"}
    known[part] = found
    mine = {p: known[p]["mmdata"]["cpu_ms_per_image"] for p in ("a", "b") if p in known}
    if "bare" in known:
        known["cpu_over_bare"] = {
            p: round(cpu / known["bare"][f"{p.upper()}_cpu_ms_per_image"], 2) for p, cpu in mine.items()
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def judge() -> bool:
    """Print how the results stand to what was asked for; whether all that is there is met."""
    known, all_met = json.loads(RESULTS.read_text(encoding="utf-8")), True
    for place, least, most in TARGETS:
        found: Any = known
        for name in place:
            found = found.get(name, {})
        if found != {}:
            met = (least is None or found >= least) and (most is None or found <= most)
            wanted = f"at least {least}" if least is not None else f"at most {most}"
            print(f"{'.'.join(place)}: {found}, {wanted}: {'met' if met else 'NOT MET'}")
            all_met = all_met and met
    return all_met


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the corpora are kept")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all but memory")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print only")
    asked = parser.parse_args()
    for corpus in (photographs.A, photographs.B):
        photographs.make(corpus, asked.folder)
    for part in asked.parts or PARTS[:-1]:
        found = measure(part, asked.folder, asked.rows, asked.rounds)
        print(part, json.dumps(found, indent=2), f"load {os.getloadavg()[0]:.1f}", flush=True)
        if not asked.dry:
            keep(part, found)
    return 0 if asked.dry or judge() else 1


if __name__ == "__main__":
    raise SystemExit(main())
