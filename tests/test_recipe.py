"""How a recipe is read: the shapes a step may have, overrides, and the JSON Schema that editors check it with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdata import catalogue, registry
from mmdata.errors import RecipeError
from mmdata.recipe import FilterStep, OperatorStep, Recipe, document_of, load, parse, with_overrides
from mmdata.recipe_schema import json_schema

ROOT = Path(__file__).resolve().parents[1]
HEAD = "name: pets\ndataset: data/pets\nsource: {kind: urls, path: pets.csv}\n"

FULL = """
name: pets
seed: 7
dataset: data/pets
source: {kind: urls, path: pets.parquet, url: URL, caption: TEXT, columns: [license]}
fetch: {image_size: 256, resize_mode: keep_ratio, timeout_s: 20, retries: 2}
steps:
  - probe_image
  - filter: {basic: "least(original_width_px, original_height_px) >= 200 AND aspect_ratio <= 3"}
  - score_clip: {model: ViT-L-14, pretrained: datacomp_xl_s13b_b90k, as: large}
  - filter: {aligned: "large_score >= 0.243"}
  - hash_image:
  - near_duplicates: {of: phash, max_distance: 4, prefer: ["original_width_px * original_height_px desc"]}
  - filter: {unique: "near_duplicates_rank = 1"}
export: {format: webdataset, path: pets-shards, shard_size: 1GB, columns: [caption, large_score]}
"""


def test_a_whole_recipe() -> None:
    recipe = parse(FULL)
    assert (recipe.name, recipe.seed, recipe.dataset) == ("pets", 7, "data/pets")
    assert (recipe.source.url, recipe.source.caption, recipe.source.columns) == ("URL", "TEXT", ("license",))
    assert (recipe.fetch.timeout_s, recipe.fetch.retries, recipe.fetch.concurrency) == (20.0, 2, 256)
    assert [s.name for s in recipe.steps] == [
        *("probe_image", "basic", "large", "aligned", "hash_image", "near_duplicates", "unique"),
    ]
    assert recipe.steps[2] == OperatorStep(
        operator="score_clip", options={"model": "ViT-L-14", "pretrained": "datacomp_xl_s13b_b90k"}, alias="large"
    )
    assert recipe.steps[3] == FilterStep(name="aligned", sql="large_score >= 0.243")
    assert recipe.export is not None
    assert (recipe.export.max_bytes, recipe.export.columns) == (10**9, ("caption", "large_score"))


def test_defaults() -> None:
    recipe = parse(HEAD)
    assert (recipe.seed, recipe.steps, recipe.export) == (0, (), None)
    assert (recipe.source.url, recipe.source.caption) == ("url", None)
    assert parse(HEAD + "steps:\n").steps == ()


def test_a_step_is_a_name_or_a_name_with_options() -> None:
    steps = parse(HEAD + "steps:\n- probe_image\n- probe_image:\n- probe_image: {}\n- hash_image: {as: again}\n").steps
    assert steps[0] == steps[1] == steps[2] == OperatorStep(operator="probe_image")
    assert steps[3] == OperatorStep(operator="hash_image", alias="again")
    assert steps[3].name == "again"


def test_step_keys_are_not_options() -> None:
    text = HEAD + "steps:\n- near_duplicates: {as: close, on_error: keep, max_failed: 0.5, max_distance: 2}\n"
    [step] = parse(text).steps
    assert step == OperatorStep(
        operator="near_duplicates", options={"max_distance": 2}, alias="close", on_error="keep", max_failed=0.5
    )


def test_one_mapping_may_hold_several_filters() -> None:
    steps = parse(HEAD + "steps:\n- filter: {b: number > 1, a: number < 5}\n- filter: {c: 'true'}\n").steps
    assert [(s.name, s.sql) for s in steps if isinstance(s, FilterStep)] == [
        ("b", "number > 1"),
        ("a", "number < 5"),
        ("c", "true"),
    ]


def test_a_plain_value_may_be_repeated_by_alias() -> None:
    text = HEAD + "steps:\n- filter: {a: &rule number > 1}\n- filter: {b: *rule}\n"
    assert [s.sql for s in parse(text).steps if isinstance(s, FilterStep)] == ["number > 1", "number > 1"]


def test_a_mapping_is_read_as_yaml_is_and_is_left_alone() -> None:
    document = yaml.safe_load(FULL)
    before = json.dumps(document)
    assert parse(document) == parse(FULL)
    assert parse(document, overrides=["filters.basic=true", "steps.large.as=small"]) != parse(FULL)
    assert json.dumps(document) == before
    recipe = parse(FULL)
    assert parse(recipe) is recipe


def test_a_recipe_survives_being_written_down() -> None:
    recipe = parse(FULL)
    assert parse(yaml.safe_dump(document_of(recipe), sort_keys=False)) == recipe


@pytest.mark.parametrize(
    ("assignment", "check"),
    [
        ("name=cats", lambda r: r.name == "cats"),
        ("dataset= elsewhere ", lambda r: r.dataset == "elsewhere"),
        ("seed=3", lambda r: r.seed == 3),
        ("fetch.timeout_s=5", lambda r: r.fetch.timeout_s == 5.0),
        ("fetch.allow_private=true", lambda r: r.fetch.allow_private is True),
        ("source.caption=null", lambda r: r.source.caption is None),
        ("fetch={image_size: 64}", lambda r: (r.fetch.image_size, r.fetch.retries) == (64, 0)),
        ("source.path=a=b.csv", lambda r: r.source.path == "a=b.csv"),
        ("source.columns=[license, size]", lambda r: r.source.columns == ("license", "size")),
        ("export=null", lambda r: r.export is None),
        ("export.shard_size=2MiB", lambda r: r.export.max_bytes == 2 * 1024 * 1024),
        ("filters.basic=a = 'b' AND c >= 1", lambda r: r.steps[1].sql == "a = 'b' AND c >= 1"),
        ("filters.aligned=true", lambda r: r.steps[3].sql == "true"),
        ("steps.near_duplicates.max_distance=2", lambda r: r.steps[5].options["max_distance"] == 2),
        ("steps.near_duplicates.prefer=[key desc]", lambda r: r.steps[5].options["prefer"] == ["key desc"]),
        ("steps.large.model=RN50", lambda r: r.steps[2].options["model"] == "RN50"),
        ("steps.large.on_error=keep", lambda r: r.steps[2].on_error == "keep"),
        ("steps.probe_image.max_failed=1", lambda r: r.steps[0].max_failed == 1),
        ("steps.hash_image.as=h", lambda r: r.steps[4].name == "h"),
    ],
)
def test_overrides(assignment: str, check: Any) -> None:
    before, after = parse(FULL), parse(FULL, overrides=[assignment])
    assert check(after)
    assert not check(before)
    assert len(after.steps) == len(before.steps)


def test_later_overrides_see_earlier_ones() -> None:
    document = yaml.safe_load(FULL)
    changed = with_overrides(document, ["steps.probe_image.as=p", "steps.p.max_failed=1", "seed=1", "seed=2"])
    assert changed["steps"][0] == {"probe_image": {"as": "p", "max_failed": 1}}
    assert changed["seed"] == 2
    assert document["steps"][0] == "probe_image"


def test_a_missing_section_is_made_by_an_override() -> None:
    assert parse(HEAD, overrides=["export.path=out", "fetch.retries=1"]).export is not None


def test_the_place_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pets.yaml"
    path.write_text(HEAD + "steps: [probe_imag]\n")
    with pytest.raises(RecipeError, match=rf"^{path}: step 1: no operator is called 'probe_imag'"):
        load(path)
    path.write_bytes(HEAD.encode() + b"# \xff\n")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load(path)


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda c: (
            st.lists(c)
            | st.dictionaries(
                st.sampled_from(
                    ["name", "steps", "source", "filter", "probe_image", "as", "path", "export", "fetch", "x"]
                ),
                c,
            )
        ),
    )
)
def test_whatever_stands_in_the_yaml_is_a_recipe_or_a_recipe_error(document: Any) -> None:
    try:
        found = parse(yaml.safe_dump(document))
    except RecipeError as error:
        found = str(error)
    assert isinstance(found, Recipe) or (found.startswith("recipe: ") and "\n" not in found)


# The JSON Schema


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads((ROOT / "schemas" / "recipe.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_accepts_a_whole_recipe(validator: Any) -> None:
    assert list(validator.iter_errors(yaml.safe_load(FULL))) == []
    assert list(validator.iter_errors(yaml.safe_load(HEAD))) == []


def test_the_schema_accepts_the_shipped_recipes(validator: Any) -> None:
    names = [line.split()[0] for line in catalogue.shipped_recipes().splitlines()]
    assert names
    for name in names:
        text = catalogue.shipped_recipe(name)
        assert [e.message for e in validator.iter_errors(yaml.safe_load(text))] == [], name
        assert parse(text).steps


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dataset:", "datset:"),
        ("image_size:", "imagesize:"),
        ("caption: TEXT", "captoin: TEXT"),
        ("- probe_image\n", "- probe_imag\n"),
        ("score_clip:", "score_clp:"),
        ("max_distance: 4", "max_distence: 4"),
        ("max_distance: 4", "max_distance: four"),
        ("as: large", "as: Large One"),
        ("format: webdataset", "format: tar"),
        ("shard_size: 1GB", "shardsize: 1GB"),
        ('{unique: "near_duplicates_rank = 1"}', "{unique: 5}"),
        ('{unique: "near_duplicates_rank = 1"}', "{}"),
        ("name: pets\n", ""),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(validator: Any, old: str, new: str) -> None:
    assert old in FULL
    document = yaml.safe_load(FULL.replace(old, new, 1))
    assert list(validator.iter_errors(document))
    with pytest.raises(RecipeError):
        _plan(document)


def _plan(document: dict[str, Any]) -> None:
    """Reads the recipe, and its operators' options, as a plan would."""
    for step in parse(document).steps:
        if isinstance(step, OperatorStep):
            try:
                registry.operator(step.operator).options_type.model_validate(step.options)
            except ValueError as error:
                raise RecipeError(str(error)) from None


def test_the_schema_knows_every_operator() -> None:
    choices = json_schema()["else"]["properties"]["steps"]["items"]["anyOf"]
    assert choices[0]["enum"] == registry.built_in()
    assert [next(iter(c["properties"])) for c in choices[1:]] == [*registry.built_in(), "filter"]


def test_the_schema_lets_steps_of_own_files_be(validator: Any) -> None:
    own = {**yaml.safe_load(HEAD), "steps": ["sharpness", {"mine": {"anything": 1}}, {"filter": {"f": "a > 1"}}]}
    assert list(validator.iter_errors(own))
    assert list(validator.iter_errors({**own, "operators": ["my_ops.py"]})) == []
    assert list(validator.iter_errors({**own, "operators": "my_ops.py"}))
    assert list(validator.iter_errors({**own, "operators": ["my_ops.py"], "steps": [{"a": {}, "b": {}}]}))


# What is generated


def _generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_generated_files_are_up_to_date() -> None:
    done = _generate("--check")
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_a_stale_file_is_noticed_and_written(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "schemas", tmp_path / "schemas")
    (tmp_path / "README.md").write_text("# A\n<!-- operators -->\nold\n<!-- /operators -->\nend\n")
    (tmp_path / "schemas" / "verdicts.json").write_text("[]\n")
    done = _generate("--check", "--root", str(tmp_path))
    assert done.returncode == 1
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"README.md", "schemas/verdicts.json"}
    assert _generate("--root", str(tmp_path)).returncode == 0
    assert _generate("--check", "--root", str(tmp_path)).returncode == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# A\n<!-- operators -->\n| operator |")
    assert readme.endswith("|\n<!-- /operators -->\nend\n")
    assert "| `near_duplicates` | group |" in readme
    columns = json.loads((tmp_path / "schemas" / "verdicts.json").read_text())
    assert [c["name"] for c in columns] == ["row_id", "verdict", "step", "step_name", "reason"]
    assert columns[2]["arrow_type"] == "int16"
