"""Write what is made from the code: schemas/*.json, and the table of operators in README.md between its markers.

With --check nothing is written; the exit code is 1 when something is not up to date, and its name is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmdata import catalogue

BEGIN, END = "<!-- operators -->", "<!-- /operators -->"


def wanted(root: Path) -> dict[Path, str]:
    """Every generated file with the text it should have."""
    files = {root / "schemas" / name: text for name, text in catalogue.generated().items()}
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        files[readme] = f"{before}{BEGIN}\n{catalogue.markdown_table()}\n{END}{after}"
    return files


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description="Write schemas/*.json and the table of operators in README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when something is stale")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    options = parser.parse_args()
    stale = [
        (path, text)
        for path, text in wanted(options.root).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        print(path.relative_to(options.root), "is stale: run scripts/generate.py" if options.check else "written")
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
