"""What mmdata says it offers: operators from the registry, recipes from their folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmdata import catalogue, registry, shipped
from mmdata.errors import RecipeError
from mmdata.stage import Group

BUILT_IN = [
    *("probe_image", "probe_text", "detect_language", "hash_image", "score_clip", "score_conse"),
    *("exact_duplicates", "near_duplicates"),
]


def test_the_table_has_a_sentence_for_every_operator() -> None:
    lines = {line.split()[0]: line.split(maxsplit=2) for line in catalogue.table().splitlines()}
    assert list(lines) == registry.names()
    for name in BUILT_IN:
        _, shape, summary = lines[name]
        assert shape == ("group" if issubclass(registry.operator(name), Group) else "stage")
        assert summary.endswith(".")
        assert len(summary) > 20


def test_the_markdown_table_has_five_cells_a_row() -> None:
    rows = [re.split(r"(?<!\\)\|", line) for line in catalogue.markdown_table().splitlines()]
    assert all(len(row) == 7 for row in rows)
    assert [row[1].strip() for row in rows[2:]] == [f"`{name}`" for name in registry.built_in()]
    cells = {row[1].strip(" `"): row for row in rows[2:]}
    assert cells["near_duplicates"][4].strip() == "`key`, `phash`"
    assert "`near_duplicates_rank`" in cells["near_duplicates"][5]
    assert cells["score_clip"][4].strip() == "`image`, `caption`"
    assert cells["score_clip"][5].strip() == "`clip_score`"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_description_names_options_columns_and_source(name: str) -> None:
    text = catalogue.describe(name)
    operator = registry.operator(name)
    assert text.startswith(f"{name}\n\n")
    for option in operator.options_type.model_fields:
        # An option without a word on what it is for is no option anybody can use.
        assert re.search(rf"^  {option} \(.+\): \S.+$", text, re.MULTILINE)
    for column in operator.contract(operator.options_type()).writes:
        assert f"\n  {column.name}: {column.type}" in text


def test_a_description_says_which_extra_brings_the_packages() -> None:
    assert "Needs: pip install 'mmdata[clip]'" in catalogue.describe("score_clip")
    assert "Needs" not in catalogue.describe("hash_image")
    assert "\nOptions:\n  none\n" in catalogue.describe("probe_image")


@pytest.mark.parametrize(
    ("column", "operator"),
    [
        ("phash", "hash_image"),
        ("aspect_ratio", "probe_image"),
        ("clip_score", "score_clip"),
        ("near_duplicates_rank", "near_duplicates"),
        ("clip_image_embedding", "score_clip with `embeddings: [image]`"),
        ("dhash", "hash_image with `hashes: [dhash]`"),
        ("pixel_sha256", "hash_image with `exact: true`"),
        ("scrubbed_person_count", "scrub_pii with `kinds: [person]`"),
        ("caption", None),
        ("no_such_column", None),
    ],
)
def test_who_makes_a_column(column: str, operator: str | None) -> None:
    assert registry.maker(column) == operator


def test_shipped_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.yaml").write_text("# Second: keeps half.\nname: b\n")
    (tmp_path / "a.yaml").write_text("# First.\n# More words.\nname: a\n")
    (tmp_path / "notes.txt").write_text("no recipe")
    monkeypatch.setattr(shipped, "recipe_folder", lambda: tmp_path)
    assert catalogue.shipped_recipes() == "a  First.\nb  Second: keeps half."
    assert catalogue.shipped_recipe("a") == "# First.\n# More words.\nname: a\n"
    with pytest.raises(RecipeError, match="no recipe is called 'c'; known: a, b"):
        catalogue.shipped_recipe("c")
    with pytest.raises(RecipeError, match="no recipe is called"):
        catalogue.shipped_recipe("../a")


def test_operators_cannot_be_replaced_by_a_namesake() -> None:
    from mmdata.stage import stage

    with pytest.raises(RecipeError, match="'hash_image' is taken by mmdata"):
        stage(reads="number", writes="x: int64", name="hash_image")(lambda batch: {})
    assert registry.operator("hash_image").__module__ == "mmdata.stages.hash_image"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("hash_imag", "; did you mean 'hash_image'?"),
        ("HASH_IMAGE_", "; known: filter, hash_image"),
        ("", "; known: filter, hash_image"),
    ],
)
def test_nearest(word: str, says: str) -> None:
    assert registry.nearest(word, ["hash_image", "filter"]) == says
    assert registry.nearest(word, []) == ""
