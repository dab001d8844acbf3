"""The same rule while a run goes on: whatever Python opens, moves or removes in a dataset folder, the store does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from server import BadServer, picture

# Runs the recipe, and notes every audited change below the dataset folder with the mmdata modules that led to it.
_RUN = """
import json, os, sys
recipe, folder, notes = json.loads(sys.argv[1]), sys.argv[2], []

def note(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        changing = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        paths = [path] if changing else []
    elif event in ("os.rename", "os.link", "os.symlink"):
        paths = arguments[:2]
    elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"):
        paths = arguments[:1]
    else:
        return
    inside = [os.fspath(p) for p in paths if isinstance(p, (str, os.PathLike)) and os.fspath(p).startswith(folder)]
    if inside:
        frame, modules = sys._getframe(), []
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.startswith("mmdata") and name not in modules:
                modules.append(name)
            frame = frame.f_back
        notes.append([event, inside[-1], modules])

sys.addaudithook(note)
import mmdata
mmdata.run(recipe, runner="inline", quiet=True)
from mmdata.clean import clean
clean(mmdata.open(recipe["dataset"]).store, grace_s=0)
print(json.dumps(notes))
"""


def test_a_run_changes_its_dataset_through_the_store_alone(tmp_path: Path) -> None:
    pictures = {f"/{i}.jpg": ("image/jpeg", picture(300 + i, 200)) for i in range(6)}
    with BadServer(pictures) as server:
        (tmp_path / "list.txt").write_text("".join(server.url(path) + "\n" for path in [*pictures, "/gone.jpg"]))
        folder = tmp_path / "dataset"
        recipe = {
            "name": "watched",
            "dataset": str(folder),
            "source": {"kind": "urls", "path": str(tmp_path / "list.txt")},
            "fetch": {"allow_private": True, "shard_rows": 3, "layout": "webdataset"},
            "steps": ["hash_image", {"near_duplicates": {"max_distance": 2}}, {"filter": {"all": "phash IS NOT NULL"}}],
            "export": {"path": str(tmp_path / "out")},
        }
        command = [sys.executable, "-c", _RUN, json.dumps(recipe), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    notes = json.loads(done.stdout.splitlines()[-1])
    for event, path, modules in notes:
        assert modules[0] in ("mmdata.local_disk", "mmdata.store"), f"{event} {path} by {modules}"
        assert "mmdata.store" in modules[:2], f"{event} {path} by {modules}"
    made = {path for _, path, _ in notes}
    there = {str(p) for p in folder.rglob("*") if p.is_file()}
    assert len(there) > 12
    assert there <= made, "a file came to be in the dataset folder by a way that Python does not see"
