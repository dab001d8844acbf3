"""What a second pair of eyes found in sources, joins, groups, exports and readers; each test failed before."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import adopted, picture

from mmdata import recipe as recipes
from mmdata.errors import MissingMedia, RecipeError, SourceError
from mmdata.media_ranges import RemoteFile
from mmdata.media_reader import MediaReader
from mmdata.store import Store


def folder_of(path: Path, count: int = 3) -> Path:
    path.mkdir()
    for number in range(count):
        (path / f"{number}.jpg").write_bytes(picture(number))
    return path


# Input that is wrong is told in one sentence, before anything is written


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("photos", r"^recipe: source: expected a mapping such as \{kind: images, path: photos\}, got 'photos'$"),
        (None, r"^recipe: source: expected a mapping"),
        (["photos"], r"^recipe: source\.0: expected a mapping"),
        ({"kind": ["images"], "path": "photos"}, r"^recipe: source\.kind: no source is called \['images'\]"),
        ({"kind": {"images": 1}, "path": "photos"}, r"^recipe: source\.kind: no source is called"),
    ],
)
def test_a_source_that_is_none_is_told_in_one_sentence(source: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        recipes.parse({"name": "x", "dataset": "d", "source": source})


def test_options_that_do_not_agree_are_told_without_all_the_others() -> None:
    export = {"path": "out", "samples": 5}
    with pytest.raises(RecipeError) as told:
        recipes.parse({"name": "x", "dataset": "d", "source": {"kind": "images", "path": "photos"}, "export": export})
    assert str(told.value) == "recipe: export: samples and epochs belong to mix, which is not given"


@pytest.mark.parametrize("kind", ["urls", "domains", "sha256"])
def test_a_block_list_without_a_path_does_not_mean_that_nothing_is_blocked(kind: str) -> None:
    document = {"name": "x", "dataset": "d", "source": {"kind": "images", "path": "photos"}, "block": {kind: ""}}
    with pytest.raises(RecipeError, match=rf"block\.{kind}: .*at least 1 character"):
        recipes.parse(document)


def test_a_saved_dataset_of_one_split_has_no_other(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"image": {"bytes": picture(0), "path": None}}], split="test")
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    source = {"kind": "hf", "path": str(tmp_path / "saved")}
    with pytest.raises(SourceError, match=r"is one split, test; leave out source\.split"):
        adopted(tmp_path / "no", {**source, "split": "validation"})
    assert not (tmp_path / "no").exists()
    for number, given in enumerate([{}, {"split": "test"}]):
        assert adopted(tmp_path / str(number), {**source, **given}).funnel().kept == 1


def test_a_field_that_no_sample_has_is_not_a_column_of_nulls(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(picture(0))
    (tmp_path / "0.json").write_text('{"license": "cc0"}')
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("0.jpg", "0.json"):
            tar.add(tmp_path / name, name)
    source = {"kind": "webdataset", "path": str(tmp_path / "x.tar")}
    with pytest.raises(SourceError, match=r"first 1 samples of .* has a field 'licence'.*did you mean 'license'\?"):
        adopted(tmp_path / "no", {**source, "columns": ["licence"]})
    assert not (tmp_path / "no").exists()


def test_a_group_says_before_the_fetch_that_a_column_is_of_no_use_to_it(tmp_path: Path) -> None:
    source = {"kind": "images", "path": str(folder_of(tmp_path / "in"))}
    with pytest.raises(RecipeError, match=r"^step 1 \(near_duplicates\): .*'caption' is of type string"):
        adopted(tmp_path / "ds", source, steps=[{"near_duplicates": {"of": "caption"}}])
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize("where", ["a_file/out", "a_file/deeper/out", "n" * 300])
def test_a_place_where_no_export_can_be_is_bad_input(tmp_path: Path, where: str) -> None:
    (tmp_path / "a_file").write_text("x")
    ds = adopted(tmp_path / "ds", {"kind": "images", "path": str(folder_of(tmp_path / "in"))})
    with pytest.raises(RecipeError, match=r"cannot be written"):
        ds.export(str(tmp_path / where))


def test_one_name_is_no_list_of_columns(tmp_path: Path) -> None:
    ds = adopted(tmp_path / "ds", {"kind": "images", "path": str(folder_of(tmp_path / "in"))})
    for read in (ds.to_torch, ds.to_arrow, ds.to_datasets):
        with pytest.raises(RecipeError, match=r"columns='key': expected a list of columns, such as \['key'\]"):
            read(columns="key")


# Media


def test_a_file_that_grew_without_end_costs_its_row_and_no_memory(tmp_path: Path) -> None:
    ds = adopted(tmp_path / "ds", {"kind": "images", "path": str(folder_of(tmp_path / "in"))})
    path = str(tmp_path / "in" / "0.jpg")
    size = os.path.getsize(path)
    os.truncate(path, 1 << 40)  # sparse
    with pytest.raises(MissingMedia, match="was changed") as told:
        ds.read_media(path, 0, size)
    assert not told.value.transient


def test_a_remote_file_that_is_let_go_of_is_still_read() -> None:
    """Another thread's files push it out of those with a plan; the server knows no ranges."""
    whole = bytes(range(256)) * 8

    def stream(local: Path) -> None:
        local.write_bytes(whole)

    names = iter(range(9))
    with MediaReader(Store("memory://review-part2")) as reader:
        scratch = reader._scratch_file().parent
        file = RemoteFile(lambda start, size: whole, stream, lambda: None, lambda: scratch / f"own-{next(names)}")
        assert file.read(300, 40) == whole[300:340]
        file.close()
        assert file.read(500, 9) == whole[500:509]


# Exports and what they stand beside


def test_an_export_never_replaces_the_media_that_its_dataset_adopted(tmp_path: Path) -> None:
    """The folder is an export of mmdata, which another export may replace; here it is also the source."""
    first = adopted(tmp_path / "ds", {"kind": "images", "path": str(folder_of(tmp_path / "in"))})
    shards = tmp_path / "shards"
    first.export(str(shards))
    source = {"kind": "img2dataset", "path": str(shards)}
    before = {p.name: p.read_bytes() for p in shards.iterdir()}
    with pytest.raises(RecipeError, match=r"holds the source .*choose another folder"):
        adopted(tmp_path / "no", source, export={"path": str(shards), "format": "parquet"})
    assert not (tmp_path / "no").exists()
    second = adopted(tmp_path / "second", source)
    with pytest.raises(RecipeError, match=r"holds media that the dataset adopted; choose another folder"):
        second.export(str(shards), format="parquet")
    assert {p.name: p.read_bytes() for p in shards.iterdir()} == before
    assert second.export(str(tmp_path / "shards-2"), format="parquet").rows == 3


@pytest.mark.parametrize("name", ["name", "dataset"])
def test_a_name_of_nothing_is_none(name: str) -> None:
    document = {"name": "x", "dataset": "d", "source": {"kind": "images", "path": "photos"}}
    for blank in ("", "  "):
        with pytest.raises(RecipeError, match=rf"^recipe: {name}: "):
            recipes.parse({**document, name: blank})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_of_two_columns_with_one_name_none_is_chosen(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores.{suffix}"
    if suffix == "csv":
        path.write_text("key,score,score\n000000001,1,2\n")
    else:
        pq.write_table(pa.table([["000000001"], [1], [2]], names=["key", "score", "score"]), path)
    source = {"kind": "images", "path": str(folder_of(tmp_path / "in"))}
    step = {"attach": {"path": str(path), "on": "key", "columns": ["score"]}}
    with pytest.raises(SourceError, match=r"has 2 columns 'score'; rename all but one"):
        adopted(tmp_path / "ds", source, steps=[step])


def test_of_two_columns_of_urls_none_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,url\nhttp://a.example/1.jpg,http://b.example/2.jpg\n")
    with pytest.raises(SourceError, match=r"has 2 columns 'url'; rename all but one"):
        adopted(tmp_path / "ds", {"kind": "urls", "path": str(tmp_path / "list.csv"), "url": "url"})


def test_a_later_file_without_pictures_is_told_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"image": [picture(0)]}), folder / "0.parquet")
    pq.write_table(pa.table({"image": ["not bytes"]}), folder / "1.parquet")
    with pytest.raises(SourceError, match=r"1\.parquet has no column that holds bytes"):
        adopted(tmp_path / "ds", {"kind": "parquet", "path": str(folder)})
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize("name", ["a#b", "a\nb", "a\0b", "a\u2028b", "x" * 201])
def test_a_name_that_cannot_address_a_selection_is_refused(name: str) -> None:
    document = {"name": name, "dataset": "d", "source": {"kind": "images", "path": "photos"}}
    with pytest.raises(RecipeError, match=r"^recipe: name: ") as told:
        recipes.parse(document)
    assert "\n" not in str(told.value)
    assert recipes.parse({**document, "name": "写真 é/2"}).name == "写真 é/2"


@pytest.mark.parametrize("seed", [-1, 1 << 63, True, "x"])
def test_a_seed_has_bounds(seed: Any) -> None:
    document = {"name": "x", "dataset": "d", "source": {"kind": "images", "path": "photos"}}
    with pytest.raises(RecipeError, match=r"^recipe: seed: "):
        recipes.parse({**document, "seed": seed})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block": {"phash": {"path": "p", "max_distance": True}}}, r"block\.phash\.max_distance: expected a number"),
        ({"fetch": {"max_aspect_ratio": True}}, r"fetch\.max_aspect_ratio: expected a number, got True"),
        ({"fetch": {"allow_private": "yes"}}, r"fetch\.allow_private: expected true or false, got 'yes'"),
        ({"fetch": {"allow_private": 1}}, r"fetch\.allow_private: expected true or false, got 1"),
        ({"export": {"path": "o", "shard_size": True}}, r"export\.shard_size: expected a number, got True"),
        ({"steps": [{"probe_image": {"max_failed": True}}]}, r"step 1 \(probe_image\): max_failed: expected a number"),
    ],
)
def test_a_truth_is_no_number_and_a_word_no_truth(changes: dict[str, Any], told: str) -> None:
    document = {"name": "x", "dataset": "d", "source": {"kind": "images", "path": "photos"}}
    with pytest.raises(RecipeError, match=told):
        recipes.parse({**document, **changes})


def test_readers_tell_wrong_arguments_in_one_sentence(tmp_path: Path) -> None:
    ds = adopted(tmp_path / "ds", {"kind": "images", "path": str(folder_of(tmp_path / "in"))})
    for arguments in ({"seed": "a"}, {"seed": 1.5}, {"epoch": True}, {"rank": "0", "world": 1}, {"threads": None}):
        with pytest.raises(RecipeError, match=r"^to_torch: \w+=.*: expected a whole number$"):
            ds.to_torch(**arguments)
    for reader in (ds.to_datasets, ds.to_arrow):
        with pytest.raises(RecipeError, match="'key' is named twice"):
            reader(["key", "key"])
    assert ds.to_datasets(["key"]).column_names[0] == "key"
