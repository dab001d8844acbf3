"""YAML as a recipe may use it: plain values, lists and mappings; what is doubtful is refused with its line.

In: text, or a file of it. Out: the document. RecipeError: no such file, text that is not YAML, a key written twice, an
alias of a list or mapping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mmdata.errors import RecipeError

__all__ = ["from_yaml", "text_of"]


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, where plain YAML would silently keep the last.

    And `*alias` of a list or mapping, which can grow without bound, or hold itself; one of a plain value is fine.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if isinstance(self.anchors.get(event.anchor), yaml.CollectionNode):
                problem = f"*{event.anchor} stands for a list or mapping; write it out"
                raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                mark = key_node.start_mark
                raise RecipeError(f"line {mark.line + 1}: key {key!r} is written twice in one mapping")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# As in YAML 1.2, only true and false are truth values: `on: uid` has the key `on`. Options still take yes and no.
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in found if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def from_yaml(text: str) -> Any:
    """The document in a YAML text; RecipeError names line and column."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if isinstance(error, yaml.reader.ReaderError) and isinstance(error.position, int):
            before = text[: error.position]
            place = f"line {before.count(chr(10)) + 1}: "
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise RecipeError(f"{place}not valid YAML: {problem}") from None
    except RecursionError:
        raise RecipeError("not valid YAML: nested too deeply") from None


def text_of(path: str | Path) -> str:
    """The text of a recipe file; RecipeError when there is none, or none that can be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; name the recipe file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
