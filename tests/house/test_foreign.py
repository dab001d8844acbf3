"""Foreign bytes, captions and recipes are data: nothing that could run them stands anywhere in mmdata."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from house import ROOT, imports, modules

FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "pickle.loads": "runs what the bytes say",
    "pickle.load": "runs what the bytes say",
    "marshal.loads": "makes code of bytes",
    "os.system": "a shell",
    "os.popen": "a shell",
    "yaml.unsafe_load": "makes any object",
    "yaml.full_load": "makes objects",
}
# What runs text because that is what it is for.
RUNNERS = {
    "mmdata.operator_files": {"exec", "compile"},  # the files of operators that the user's recipe names
    "mmdata.shipment": {"pickle.loads"},  # what a driver and the workers it started say over a pipe that only they have
}
# Modules that may start a process; a command is a list, never a line for a shell.
STARTERS = {
    "mmdata.doctor": "asks nvidia-smi for the GPU's name",
    "mmdata.img2dataset_backend": "img2dataset, for who asks for its fetching",
    "mmdata.nursery": "a Python of its own, from which worker processes are forked",
}


def _calls(name: str) -> list[ast.Call]:
    return [node for node in ast.walk(modules()[name]) if isinstance(node, ast.Call)]


def _keywords(call: ast.Call) -> dict[str | None, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords}


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_runs_what_it_was_given(name: str) -> None:
    for call in _calls(name):
        function, keywords = ast.unparse(call.func), _keywords(call)
        where = f"{name}:{call.lineno}: {function}"
        assert function not in FORBIDDEN or function in RUNNERS.get(name, ()), f"{where} {FORBIDDEN.get(function)}"
        assert keywords.get("shell", "False") == "False", f"{where}: a shell"
        # Said to be False, for transformers asks at the terminal where nothing is said.
        assert keywords.get("trust_remote_code", "False") == "False", f"{where}: code from a hub"
        assert keywords.get("allow_pickle", "False") == "False", f"{where}: numpy unpickles"
        if function == "torch.load":
            assert keywords.get("weights_only") == "True", f"{where}: unpickles"
        if function == "yaml.load":
            assert keywords.get("Loader", "").endswith(("SafeLoader", "_UniqueKeyLoader")), where


def test_only_these_start_processes() -> None:
    starting = {n for n in modules() if any(i.name in ("subprocess", "multiprocessing") for i in imports(n))}
    assert starting <= set(STARTERS)


def test_our_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from mmdata import recipe_yaml

    assert issubclass(recipe_yaml._UniqueKeyLoader, yaml.SafeLoader)


def test_an_error_of_any_kind_is_raised_on_or_its_catcher_says_why() -> None:
    """`except Exception` stands in row isolation and where foreign code is called, and becomes a value there."""
    reasons = []
    for name, tree in modules().items():
        lines = (ROOT / _path(name)).read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and _catches_all(node) and not isinstance(node.body[-1], ast.Raise):
                reason = re.search(r"# noqa: BLE001 {2}(\S.*)", lines[node.lineno - 1])
                assert reason, f"{name}:{node.lineno}: does not say why it catches every error"
                reasons.append(reason[1])
    assert len(reasons) > 5


def _path(name: str) -> str:
    file = name.replace(".", "/")
    return f"{file}.py" if (ROOT / f"{file}.py").exists() else f"{file}/__init__.py"


def _catches_all(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or bool(
        {"Exception", "BaseException"} & set(re.findall(r"\w+", ast.unparse(handler.type)))
    )


def test_generated_files_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
