"""Concepts of captions: MetaCLIP's and DataComp's rules beside the plainest way to say them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import make_batch
from hypothesis import given
from hypothesis import strategies as st
from stamps import stamp_pairs

from mmdata.errors import RecipeError
from mmdata.models.matching import EntryMatcher
from mmdata.models.wordnet import WordNet
from mmdata.stages.match_concepts import MatchConcepts, MatchConceptsOptions


def match(captions, **options):
    stage = MatchConcepts(MatchConceptsOptions(**options))
    stage.open("cpu")
    answer = stage.compute(make_batch(None, caption=pa.array(captions, pa.string())))
    found = answer["concepts"].to_pylist()
    assert answer["concepts_count"].to_pylist() == [None if f is None else len(f) for f in found]
    return found


@pytest.fixture
def entries(tmp_path: Path):
    def write(*lines: str) -> str:
        path = tmp_path / "entries.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return write


def test_metaclips_cat(entries):
    """The example of methods and paper: `cat,` names a cat, `category` does not."""
    path = entries("cat", "hot dog", "dog", "Paris")
    assert match(["a cat, asleep", "a category", "cat", "Cat", "concatenate cats", None, ""], entries=path) == [
        ["cat"], [], ["cat"], [], [], None, []
    ]  # fmt: skip
    assert match(["a hot dog; dog!dog", "hot  dog", "hot\tdog", "hot, dog", "in Paris?"], entries=path) == [
        ["hot dog", "dog"], ["dog"], ["hot dog", "dog"], ["dog"], ["Paris"]
    ]  # fmt: skip
    assert match(["dog-cat (dog) 'cat' \"dog\"", "`cat`:dog"], entries=path) == [[], ["cat", "dog"]]
    assert match(["hot\rdog", "a\r\ncat"], entries=path) == [["hot dog", "dog"], ["cat"]]
    assert match(["A CAT in PARIS"], entries=path, lowercase=True) == [["cat", "paris"]]


def padded_by_hand(text: str) -> str:
    for mark in [",", ".", ";", ":", "?", "!", "`"]:
        text = text.replace(mark, " " + mark + " ")
    return " " + text.replace("\t", " ").replace("\n", " ").replace("\r", " ") + " "


def test_every_caption_of_the_stamps_against_every_name_of_wordnet():
    names = WordNet().synset_names()[::8]
    captions = sorted({caption for _, caption in stamp_pairs()})[::4]
    assert len(names) > 3000
    assert len(captions) > 100
    matcher = EntryMatcher(names)
    expected = [[n for n in names if f" {n} " in padded_by_hand(c)] for c in captions]
    assert [matcher.find(c) for c in captions] == expected
    assert sum(map(len, expected)) > 20


@given(st.lists(st.text("ab ,.\n", min_size=1, max_size=4), max_size=6), st.text("ab ,.\n", max_size=30))
def test_any_text_and_any_entries(entries, text):
    entries = [e for e in dict.fromkeys(entries) if e]
    assert EntryMatcher(entries).find(text) == [e for e in entries if f" {e} " in padded_by_hand(text)]


def test_the_default_list_is_wordnets():
    [found] = match(["an ice cream by the sea, and a dog"])
    assert {"ice cream", "sea", "dog"} <= set(found)
    assert found == sorted(found)  # the order of the list


def test_lists_of_each_kind_say_the_same(tmp_path: Path):
    names = ["dog", "ice cream", "naïve", "自転車"]
    (tmp_path / "e.txt").write_bytes(("\ufeff" + "\r\n".join([*names, "", "dog"]) + "\r\n").encode())
    (tmp_path / "e.json").write_text(json.dumps(names))
    pq.write_table(pa.table({"entry": names}), tmp_path / "e.parquet")
    pq.write_table(
        pa.table({"entry": pa.array(names, pa.large_string())}), tmp_path / "large.parquet"
    )  # as polars does
    for name in ("e.txt", "e.json", "e.parquet", "large.parquet"):
        caption = "naïve: dog eats ice cream on 自転車 ."
        assert match([caption], entries=str(tmp_path / name)) == [["dog", "ice cream", "naïve", "自転車"]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, "No such file"),
        ("empty.txt", b"\n \n", "no entry"),
        ("latin.txt", "naïve".encode("latin-1"), "utf-8"),
        ("dict.json", b'{"a": 1}', "list of texts"),
        ("numbers.json", b"[1]", "list of texts"),
        ("broken.json", b"[", "line 1"),
        ("broken.parquet", b"PAR1", "cannot read"),
    ],
)
def test_a_list_that_cannot_be_read_is_told_before_anything_runs(tmp_path: Path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=says):
        MatchConcepts.contract(MatchConceptsOptions(entries=str(tmp_path / name)))


def test_what_a_list_holds_is_part_of_the_identity(entries):
    options = MatchConceptsOptions(entries=entries("cat"))
    [weights] = MatchConcepts.contract(options).weights
    assert weights.path == options.entries
    named = {w.name for w in MatchConcepts.contract(MatchConceptsOptions(rule="synsets")).weights}
    assert {"entries", "wordnet index.noun", "wordnet noun.exc"} <= named


def test_how_a_list_is_read_is_part_of_the_identity(tmp_path: Path):
    """One file under two names: text with one odd entry, and a list of one."""
    named = []
    for name, found in (("e.txt", []), ("e.json", ["cat"])):
        (tmp_path / name).write_text('["cat"]')
        options = MatchConceptsOptions(entries=str(tmp_path / name))
        named.append([weights.name for weights in MatchConcepts.contract(options).weights])
        assert match(["a cat"], entries=options.entries) == [found]
    assert named[0] != named[1]


def test_datacomps_rule(entries):
    """Worked by hand over WordNet 3.0: the first synset of `dogs` is n02084071, of `dog,` none, of `of` none."""
    captions = ["Two dogs of mine", "dog, cat.", "of the and", "running quickly", None, "", "cats and dogs and Cats"]
    assert match(captions, rule="synsets") == [
        ["n02084071"], [], [], [], None, [], ["n02121620", "n02084071"]
    ]  # fmt: skip
    only_cats = entries("n02121620")
    assert match(["cats and dogs"], rule="synsets", entries=only_cats) == [["n02121620"]]


def test_datacomps_rule_compares_the_number_alone():
    """`cogent` is an adjective, a01770393; ImageNet's n01770393 is the scorpion."""
    assert match(["a cogent theorem"], rule="synsets") == [["a01770393"]]


def test_datacomps_rule_beside_nltks_words_in_every_stamp():
    """Whether any word's first synset is in the list, word for word, with the list read by this test."""
    path = Path(find_spec("timm").origin).parent / "data/_info/imagenet21k_goog_synsets.txt"
    numbers = {int(line[1:]) for line in path.read_text().split()}
    assert len(numbers) == 21_843
    reader = WordNet()
    nouns = {int(line[:8]) for line in Path("/usr/share/wordnet/data.noun").read_text().splitlines() if line[0] != " "}
    assert numbers < nouns  # the ids are of this WordNet
    captions = sorted({caption for _, caption in stamp_pairs()})
    expected = []
    for caption in captions:
        senses = [reader.first_synset(word) for word in caption.split()]
        expected.append(any(s is not None and int(s[1:]) in numbers for s in senses))
    assert [bool(found) for found in match(captions, rule="synsets")] == expected
    assert 0 < sum(expected) < len(captions)


def test_ids_that_are_none_are_refused(entries):
    with pytest.raises(RecipeError, match="no synset id"):
        MatchConcepts.contract(MatchConceptsOptions(rule="synsets", entries=entries("n02121620", "dog")))


def test_poison_ends_and_fits(entries):
    path = entries("cat", "zebra", "(a+)+$")
    long = "cat " * 2_500_000 + "zebra"  # 10 MB; what stands after the first 100,000 characters is not looked at
    poison = [
        "قطة cat 猫",
        "\x00cat\x00",
        "'; DROP TABLE rows; --",
        "<script>cat</script>",
        "a" * 50_000 + "!",
        "(a+)+$",
    ]
    assert match([long, *poison], entries=path) == [["cat"], ["cat"], [], [], [], [], ["(a+)+$"]]
    assert match([long, *poison], rule="synsets")[0] == ["n02121620"]
