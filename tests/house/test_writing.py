"""Only `Store` writes into a dataset folder: every other call that writes, moves or removes a file is listed here.

The list names modules with where they write. A module that begins to write fails this test until somebody has said
where to; one that stops has to leave the list.
"""

from __future__ import annotations

import ast

from house import modules

WRITERS = {
    "local_disk": "the two ways a name comes to be in a dataset folder, for Store alone",
    "store": "the only door to a dataset folder",
    "objects.memory": "memory://, for Store alone",
    "column_files": "write_parquet makes local files, which Store.commit publishes",
    "scratch": "scratch folders of this process",
    "ingest_journal": "node scratch",
    "worker_journal": "node scratch: what a worker was doing",
    "media_ranges": "scratch: a remote file's copy, removed again",
    "shard_layout": "scratch: a layout's Parquet and tar, which Store publishes",
    "img2dataset_backend": "scratch: img2dataset's list, arguments and output folder",
    "media.tar": "a local file in scratch, or in an export's attempt folder",
    "export": "notes move between an export's attempt and plan folders",
    "export_plan": "the plan folder beside an export's attempt folder",
    "export_order": "the plan folder: rows on their way to their order",
    "export_rows": "the plan folder",
    "export_shards": "an export's attempt folder",
    "exporters.shape": "an export's attempt folder",
    "exporters.webdataset": "an export's attempt folder",
    "exporters.parquet": "an export's attempt folder",
    "exporters.datacomp": "an export's attempt folder",
    "exporters.files": "an export's attempt folder",
    "exporters.mds": "an export's attempt folder",
    "exporters.lance_table": "an export's attempt folder",
    "exporters.energon": "an export's attempt folder",
    "publish": "an export's attempt folder, renamed when it is whole",
    "layout": "Parquet bytes in memory, which are hashed",
    "answers": "the answer of `mmdata sql`, to standard output",
    "sample": "a temporary dataset's list, in scratch",
    "fetched_before": "node scratch: the indexes of fetch.skip_existing",
    "groups.rare_ngrams": "scratch: n-grams on their way to being counted",
    "groups.mapped": "scratch: long arrays, in files without a name",
    "groups.visited_rows": "scratch: keys of a group's answer, until they are published",
    "groups.minhash_duplicates": "scratch: band keys, signatures and shingles of rows that are compared",
    "joins.given_rows": "scratch: rows of the files that `attach` reads",
    "joins.keys": "scratch: keys on their way to being sorted",
    "joins.arrays": "scratch: arrays that cannot be mapped from where they lie",
    "clean": "removes stale scratch; in the dataset it asks Store",
    "cli": "the picture that `mmdata show --svg FILE` asks for, where the user says",
    "models.english": "nowhere: spaCy's `pipe` is fsspec's name for a write",
    "models.weight_files": "the cache of weights that recipes name by URL",
    "demo": "the demo's own folder, around its dataset",
}

_METHODS = {"write_text", "write_bytes", "unlink", "rmdir", "touch", "mkdir", "symlink_to", "hardlink_to", "rename"}
_FUNCTIONS = {
    *("os.remove", "os.unlink", "os.rmdir", "os.mkdir", "os.makedirs", "os.rename", "os.replace", "os.link"),
    *("os.symlink", "os.truncate", "shutil.rmtree", "shutil.move", "shutil.copy", "shutil.copy2", "shutil.copytree"),
    *("shutil.copyfile", "shutil.copyfileobj", "tempfile.mkdtemp", "tempfile.mkstemp", "tempfile.TemporaryDirectory"),
    *(
        "tempfile.NamedTemporaryFile",
        "tempfile.TemporaryFile",
        "pq.write_table",
        "pq.ParquetWriter",
        "pyarrow.parquet.ParquetWriter",
        "np.save",
        "tarfile.open",
    ),
}
_OBJECTS = {"put_if_absent"}  # of `ObjectStore`; `replace` and `delete` have too many namesakes
_FSSPEC = {"pipe", "pipe_file", "put_file", "cp_file", "rm_file", "mv", "rm"}


def _writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if name.split(".")[-1] in ("open", "OSFile"):
        said = [ast.unparse(a) for a in call.args] + [ast.unparse(k.value) for k in call.keywords if k.arg == "mode"]
        return any(mode.strip("'\"")[:1] in "wax" and len(mode) <= 6 for mode in said if mode[:1] in "'\"") or any(
            flag in text for text in said for flag in ("O_CREAT", "O_WRONLY", "O_RDWR")
        )
    return name in _FUNCTIONS or method in _METHODS or method in _FSSPEC


def _calls(name: str) -> list[ast.Call]:
    return [node for node in ast.walk(modules()[name]) if isinstance(node, ast.Call)]


def test_every_module_that_writes_files_says_where() -> None:
    writing = {name.removeprefix("mmdata.") for name in modules() if any(map(_writes, _calls(name)))}
    assert writing == set(WRITERS)


def test_the_rule_sees_what_it_should() -> None:
    seen = (
        "open(p, 'w')|p.open('xb')|open(p, mode='a')|pa.OSFile(p, 'wb')|os.open(p, os.O_CREAT)|pq.ParquetWriter(p, s)|"
        "fs.pipe_file(a, b)"
    )
    unseen = (
        "open(p)|pa.OSFile(p)|open(p, 'rb')|p.open(encoding='utf-8')|text.replace('a', 'b')|os.open(p, os.O_RDONLY)"
    )
    for source in seen.split("|"):
        assert _writes(ast.parse(source, mode="eval").body), source  # type: ignore[arg-type]
    for source in unseen.split("|"):
        assert not _writes(ast.parse(source, mode="eval").body), source  # type: ignore[arg-type]


def test_only_the_store_publishes_into_a_dataset() -> None:
    for name in modules():
        for call in _calls(name):
            text = ast.unparse(call.func)
            owner, _, method = text.rpartition(".")
            if text in ("local_disk.publish", "local_disk.put") or method in _OBJECTS:
                assert name == "mmdata.store", f"{name}:{call.lineno}: {text}"
            if owner.endswith("fs") and method in _FSSPEC:
                assert name == "mmdata.objects.memory", f"{name}:{call.lineno}: {text}"
            if owner.endswith("_wire"):
                assert name == "mmdata.object_store", f"{name}:{call.lineno}: {text}"
