"""The repository: the lock file, the extras, and what no file may say."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
from house import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmdata.doctor import EXTRAS

# Put together from halves, so that this file says none of them itself.
REGISTRY_HOSTS = [
    a + b for a, b in [("pypi", ".org"), ("pythonhosted", ".org"), ("deb.deb", "ian.org"), ("npmjs", ".org")]
]
MACHINE_PATHS = re.compile("|".join(["/ro" + "ot/", "/wo" + "rk/", "/home/[a-z]", "/opt/" + "wheels", "/Us" + "ers/"]))


def _project() -> dict:  # type: ignore[type-arg]
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# The lock → the extras and the dependency group that it is compiled from.
LOCKS = {"requirements.lock": (["all"], "dev"), "requirements-peers.lock": (["mds"], "peers")}


def _locked(lock: str) -> dict[str, str]:
    """Package → its entry in the lock, hashes included; a package with several versions has several entries joined."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    entries: dict[str, str] = {}
    for entry in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE):
        if entry.strip() and not entry.startswith("#"):
            name = canonicalize_name(re.split(r"[=\[; ]", entry, maxsplit=1)[0])
            entries[name] = entries.get(name, "") + entry
    return entries


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_an_exact_version_and_hashes(lock: str) -> None:
    locked = _locked(lock)
    assert len(locked) > 80
    for name, entry in locked.items():
        assert re.match(r"[\w.\[\]-]+==\S+", entry), name
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_names_no_index(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("-")] == []
    assert "://" not in text


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_holds_what_the_project_asks_for(lock: str) -> None:
    extras, group = LOCKS[lock]
    project = _project()
    asked = [*project["project"]["dependencies"], *project["dependency-groups"][group]]
    for extra in extras:
        asked += project["project"]["optional-dependencies"][extra]
    locked = _locked(lock)
    for requirement in map(Requirement, asked):
        if requirement.name == "mmdata":  # an extra that stands for others
            for extra in requirement.extras:
                asked += project["project"]["optional-dependencies"][extra]
            continue
        entry = locked[canonicalize_name(requirement.name)]
        versions = re.findall(r"^[^\s=]+==([^\s;\\]+)", entry, flags=re.MULTILINE)
        assert all(requirement.specifier.contains(v, prereleases=True) for v in versions), requirement


def test_doctor_knows_the_extras_and_their_packages() -> None:
    extras = _project()["project"]["optional-dependencies"]
    # `all` is what can be installed together.
    assert extras.pop("all") == [f"mmdata[{','.join(e for e in EXTRAS if not EXTRAS[e].apart)}]"]
    asked = {name: {canonicalize_name(Requirement(r).name) for r in wanted} for name, wanted in extras.items()}
    assert {name: set(extra.packages) for name, extra in EXTRAS.items()} == asked


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert len(files) > 100
    found = []
    for path in files:
        if not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if any(host in line for host in REGISTRY_HOSTS) or MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_the_wheel_has_the_licence_and_the_commands_that_the_readme_gives_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo:", "test:"} <= {line.split()[0] for line in makefile.splitlines() if re.match(r"[a-z-]+:", line)}
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
