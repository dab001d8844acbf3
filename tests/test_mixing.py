"""Several datasets in one export: counts by hand, proportions everywhere, repeats, keys apart, columns united."""

from __future__ import annotations

import tarfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import kept_rows
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmdata.errors import RecipeError
from mmdata.export import ExportOptions, export
from mmdata.export_command import mix_entry
from mmdata.mixing import Part, divide
from mmdata.settings import MixOptions


class Place:
    """Two datasets: `pets`, 32 kept rows, and `signs`, 16, whose pictures are others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pets = kept_rows.dataset(folder / "pets")
        self.signs = kept_rows.dataset(folder / "signs.v2", shards=1)
        self.opened: list[tuple[str, str | None]] = []

    def open(self, path: str, selection: str | None) -> kept_rows.KeptRows:
        self.opened.append((path, selection))
        return {"pets": self.pets, "signs.v2": self.signs}[Path(path).name]

    def run(self, name: str, *mix: Any, **options: Any) -> pa.Table:
        """The Parquet of all samples, in order."""
        entries = tuple({"dataset": str(self.folder / m[0]), "weight": m[1], **(m[2] if m[2:] else {})} for m in mix)
        given = {"format": "parquet", "shard_rows": 7, **options}
        done = export(
            self.pets, ExportOptions(path=str(self.folder / name), mix=entries, **given), None, opener=self.open
        )
        table = pa.concat_tables([pq.read_table(p) for p in sorted(done.path.glob("*.parquet"))])
        assert done.rows == len(table)
        return table


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def names(table: pa.Table) -> list[str]:
    return [str(k).rpartition("-")[0] for k in table.column("key").to_pylist() if "-r" not in k]


def test_shares_counts_and_keys(place: Place) -> None:
    """Signs take a quarter, pets what is left: 30 and 10 of 40 samples."""
    table = place.run("out", ("signs.v2", 0.25), samples=40)
    assert Counter(names(table)) == {"pets": 30, "signs-v2": 10}
    keys = table.column("key").to_pylist()
    assert len(set(keys)) == 40
    assert not [k for k in keys if "." in k]
    assert table.column("mixed_from").to_pylist() == names(table)
    in_pets = [k for k in keys if k.startswith("pets-")]
    assert in_pets == sorted(in_pets)  # each dataset in its own order
    for key, image in zip(keys, table.column("image").to_pylist(), strict=True):
        source = place.pets if key.startswith("pets-") else place.signs
        assert image["bytes"] == source.pictures[key.rpartition("-")[2]]
        assert image["path"] == f"{key}.jpg"


@pytest.mark.parametrize("shuffle", ["none", "buffer", "full"])
def test_every_stretch_holds_the_datasets_in_their_proportions(place: Place, shuffle: str) -> None:
    found = names(place.run("out", ("signs.v2", 0.25), samples=40, shuffle=shuffle, seed=4))
    for stop in range(1, 41):
        assert abs(found[:stop].count("signs-v2") - stop / 4) <= 1


def test_more_than_one_pass_repeats_whole_passes_and_a_chosen_rest(place: Place) -> None:
    """60 samples, two thirds from signs: 40 of its 16 rows are two passes and 8 rows; pets give 20 of 32."""
    table = place.run("out", ("signs.v2", 2), ("pets", 1), samples=60)
    keys = table.column("key").to_pylist()
    assert len(set(keys)) == 60
    signs = [k for k in keys if k.startswith("signs-v2-")]
    passes = [[k for k in signs if k.count("-") == 2], *([k for k in signs if k.endswith(f"-r{n}")] for n in (1, 2, 3))]
    assert [len(p) for p in passes] == [16, 16, 8, 0]
    assert {k.removesuffix("-r1") for k in passes[1]} == set(passes[0])
    assert {k.removesuffix("-r2") for k in passes[2]} < set(passes[0])
    assert signs == [*passes[0], *passes[1], *passes[2]]
    assert len([k for k in keys if k.startswith("pets-")]) == 20
    for key, image in zip(keys, table.column("image").to_pylist(), strict=True):
        if key.startswith("signs"):
            assert image["bytes"] == place.signs.pictures[key.split("-")[2]]


def test_a_shuffled_pass_has_an_order_of_its_own(place: Place) -> None:
    table = place.run("out", ("signs.v2", 0.5), samples=64, shuffle="full")
    signs = [k for k in table.column("key").to_pylist() if k.startswith("signs")]
    first, second = [k for k in signs if "-r" not in k], [k.removesuffix("-r1") for k in signs if k.endswith("-r1")]
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_seed_chooses_the_rest_and_any_writers_give_the_same(place: Place) -> None:
    one = place.run("one", ("signs.v2", 0.25), samples=20, seed=1)
    again = place.run("again", ("signs.v2", 0.25), samples=20, seed=1, workers=3)
    other = place.run("other", ("signs.v2", 0.25), samples=20, seed=2)
    assert one.equals(again)
    assert set(one.column("key").to_pylist()) != set(other.column("key").to_pylist())


def test_epochs_are_multiples_of_all_rows(place: Place) -> None:
    assert len(place.run("one", ("signs.v2", 0.5))) == 48
    assert len(place.run("two", ("signs.v2", 0.5), epochs=2.5)) == 120


@pytest.mark.parametrize(
    ("weights", "samples", "expected"),
    [
        ((1, 1, 1), 10, [4, 3, 3]),  # quotas 3 1/3 each: the first gets the one left over
        ((0.5, 0.3, 0.2), 7, [4, 2, 1]),  # quotas 3.5, 2.1, 1.4: the largest rest is .5
        ((0.7, 0.3), 1, [1, 0]),
        ((5, 2, 1), 8, [5, 2, 1]),
    ],
)
def test_division_by_largest_remainders(weights: Any, samples: int, expected: list[int]) -> None:
    parts = [Part(n, str(n), None, Fraction(str(w)), rows=100) for n, w in enumerate(weights)]  # type: ignore[arg-type]
    mix = (MixOptions(dataset="x", weight=1),)
    assert divide(parts, ExportOptions(path="out", mix=mix, samples=samples)) == expected


def test_columns_are_united_and_null_where_they_are_absent(place: Place) -> None:
    place.signs.tables = [
        t.drop_columns(["rare"]).append_column("angle", t.column("width_px")) for t in place.signs.tables
    ]
    table = place.run("out", ("signs.v2", 0.5), samples=32)
    for row in table.to_pylist():
        is_pet = row["mixed_from"] == "pets"
        assert (row["angle"] is None) == is_pet
        if not is_pet:
            assert row["rare"] is None
    assert table.column("rare").null_count < 32


def test_two_types_of_one_column_are_refused(place: Place) -> None:
    place.signs.tables = [
        t.set_column(t.schema.get_field_index("rare"), "rare", t.column("license")) for t in place.signs.tables
    ]
    with pytest.raises(RecipeError, match=r"'rare' is double in 'pets' and string in 'signs-v2'"):
        place.run("out", ("signs.v2", 0.5))
    assert not (place.folder / "out").exists()


def test_a_selection_is_a_dataset_of_its_own(place: Place) -> None:
    table = place.run("out", ("pets", 0.5, {"selection": "strict"}), samples=10)
    assert place.opened == [(str(place.folder / "pets"), "strict")]
    assert Counter(names(table)) == {"pets": 5, "pets-strict": 5}


@pytest.mark.parametrize(
    ("mix", "told"),
    [
        ([("signs.v2", 0.6), ("signs.v2", 0.4, {"name": "other"})], "leave nothing for the dataset"),
        ([("signs.v2", 0.3), ("signs.v2", 0.3)], "two datasets are called 'signs-v2'"),
        ([("signs.v2", 0.3, {"name": "Pets"})], "two datasets are called 'pets'"),
    ],
)
def test_mixes_that_make_no_sense_are_told(place: Place, mix: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        place.run("out", *mix)


def test_an_empty_dataset_and_a_taken_name_are_told(place: Place) -> None:
    whole = place.signs.tables
    place.signs.tables = [whole[0].slice(0, 0)]
    with pytest.raises(RecipeError, match="'signs-v2' has no kept rows"):
        place.run("out", ("signs.v2", 0.5))
    place.signs.tables = [whole[0].append_column("mixed_from", whole[0].column("license"))]
    with pytest.raises(RecipeError, match="'mixed_from', which a mix writes itself"):
        place.run("out", ("signs.v2", 0.5))


def test_never_into_a_dataset_that_is_mixed_in(place: Place) -> None:
    with pytest.raises(RecipeError, match="in or around the dataset"):
        place.run("signs.v2/out", ("signs.v2", 0.5))


def test_tars_and_the_card_of_a_mix(place: Place) -> None:
    entries = ({"dataset": str(place.folder / "signs.v2"), "weight": 0.25},)
    options = ExportOptions(path=str(place.folder / "out"), mix=entries, samples=40, shard_rows=20, shuffle="full")
    out = export(place.pets, options, "name: pets\n", opener=place.open).path
    with tarfile.open(out / "00000.tar") as tar:
        members = tar.getnames()
    assert len(members) == 60
    assert {m.partition("-")[0] for m in members} == {"pets", "signs"}
    card = (out / "README.md").read_text()
    assert "30 samples of 32 kept rows, keys `pets-<key>`" in card
    assert "10 samples of 16 kept rows, keys `signs-v2-<key>`" in card
    assert "chain of signs-v2: `c0ffee`" in card
    assert export(place.pets, options, "name: pets\n", opener=place.open).written is False
    place.signs.tables = [place.signs.tables[0].slice(1)]
    assert export(place.pets, options, "name: pets\n", opener=place.open).written is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/b=0.3", ("data/b", 0.3, None)),
        ("s3://bucket/x=1/b=2", ("s3://bucket/x=1/b", 2.0, None)),
        ("data/b#strict=0.3", ("data/b", 0.3, "strict")),
    ],
)
def test_the_command_lines_form(text: str, expected: tuple[str, float, str | None]) -> None:
    entry = mix_entry(text)
    assert (entry["dataset"], entry["weight"], entry["selection"]) == expected


@pytest.mark.parametrize("text", ["data/b", "=0.3", "data/b=", "data/b=x", "data/b=0", "data/b=-1", "data/b=inf"])
def test_the_command_line_says_what_it_expected(text: str) -> None:
    with pytest.raises(RecipeError, match="expected FOLDER=WEIGHT"):
        mix_entry(text)
