"""The JSON schema of a recipe, made from its pydantic model and the options of mmdata's own operators.

Operators of installed packages are not in it: the schema says the same on every machine.
"""

from __future__ import annotations

from typing import Any

from mmdata import registry
from mmdata.recipe import Recipe
from mmdata.stage import Group

__all__ = ["json_schema"]


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe, with every operator's options, for editors and `schemas/`."""
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for unused in ("OperatorStep", "FilterStep"):
        definitions.pop(unused, None)
    step_keys = {
        "as": {"type": "string", "pattern": "^[a-z][a-z0-9_]*$", "description": "prefix of the step's columns"},
        "on_error": {"enum": ["drop", "keep"], "default": "drop"},
        "max_failed": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.05},
    }
    choices: list[dict[str, Any]] = [{"enum": registry.built_in()}]
    for name in registry.built_in():
        operator = registry.operator(name)
        options = operator.options_type.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(options.pop("$defs", {}))
        group_keys = {"over": {"enum": ["kept", "all"], "default": "kept"}} if issubclass(operator, Group) else {}
        options["properties"] = {**options.get("properties", {}), **step_keys, **group_keys}
        options["type"] = ["object", "null"]
        choices.append(_one_key(name, options))
    expressions = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
    choices.append(_one_key("filter", expressions))
    description = Recipe.model_fields["steps"].description
    schema["properties"]["steps"] = {"type": "array", "description": description}
    known = {"type": "array", "items": {"anyOf": choices}}
    named = {"type": "array", "items": {"type": ["string", "object"], "minProperties": 1, "maxProperties": 1}}
    # The steps of a recipe that names files of operators may be called anything.
    schema["if"] = {"required": ["operators"], "properties": {"operators": {"minItems": 1}}}
    schema["then"] = {"properties": {"steps": named}}
    schema["else"] = {"properties": {"steps": known}}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _one_key(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {name: body}, "required": [name], "additionalProperties": False}
