"""Which concepts of a list a caption names: MetaCLIP's matching of entries, or DataComp's of WordNet synsets.

In: a text column; a list of entries or of synset ids, and WordNet. Out: the concepts of each caption. Fails:
RecipeError for a list that cannot be read, MissingExtra where WordNet is not on this machine; no caption fails.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from mmdata.batch import Batch
from mmdata.errors import RecipeError
from mmdata.models.matching import LONGEST, EntryMatcher
from mmdata.models.wordnet import WordNet, find_wordnet
from mmdata.stage import Columns, Contract, FilePath, Needs, Options, Stage, TextColumn, Weights, parse_schema

__all__ = ["MatchConcepts", "MatchConceptsOptions"]

_KINDS = (".json", ".parquet")  # any other file is text, an entry a line
_IMAGENET = "data/_info/imagenet21k_goog_synsets.txt"  # in the package timm


class MatchConceptsOptions(Options):
    """By which rule, against which list."""

    column: TextColumn = Field("caption", description="text column to look in")
    rule: Literal["substrings", "synsets"] = Field(
        "substrings", description="substrings: MetaCLIP's entries as they stand; synsets: DataComp's first synsets"
    )
    entries: FilePath | None = Field(
        None,
        description="the list: text with an entry a line, a .json list or .parquet; default: the names of WordNet's "
        "synsets, and for the rule synsets the ids of ImageNet-21k",
    )
    lowercase: bool = Field(False, description="substrings: lower-case captions and entries first (MetaCLIP does not)")
    wordnet: FilePath | None = Field(
        None, description="folder of WordNet 3.0's files, or NLTK's wordnet.zip; default: the usual places"
    )


class MatchConcepts(Stage[MatchConceptsOptions]):
    """The concepts of a list that a caption names, each once.

    Reads the caption (or `column`). Writes `concepts`, list<string>, and `concepts_count`, int32, how many those are.
    NULL without a reason: the caption is NULL. A caption that names none has an empty list and 0. Of a caption the
    first 100,000 characters are looked at.

    `rule: substrings` is MetaCLIP's: the caption is put between spaces, so are its `, . ; : ? ! `` ` ``, tabs and line
    breaks become spaces, and an entry is found where it stands between two spaces: `cat` in `a cat, sleeping`, not in
    `category`. Case counts unless `lowercase` is set; an entry with such a mark must be written with its spaces. The
    concepts are the entries, in the order of the list. MetaCLIP's 500,000 entries are WordNet's synset names, frequent
    words and word pairs of Wikipedia and titles of its much-read pages; the list may not be passed on, so that the
    default is its first part, 86,571 names from WordNet.

    `rule: synsets` is DataComp's: a word (what stands between white space) counts where the number of its first synset
    in WordNet 3.0 is that of a synset of ImageNet-21k. Words keep their marks (`dog,` is no word of WordNet), the
    part of speech is not compared: 45 words count like `cogent`, a01770393, which has the number of ImageNet's
    scorpion. The concepts are synset ids such as `n02084071`, in the order of the caption. The default list is that of
    Google's BiT, which DataComp reads, as timm ships it: 21,843 ids. DataComp's text-based filter is
    `concepts_count > 0`, and English.

    Source: metaclip/substr_matching.py of facebookresearch/MetaCLIP, Xu et al. 2023 (arXiv 2309.16671), section 3;
    baselines/apply_filter.py of mlfoundations/datacomp (does_contain_text_entity), Gadre et al. 2023 (arXiv
    2304.14108); NLTK 3.10's `synsets`, reproduced over the same files.
    """

    name = "match_concepts"
    version = 1
    label = "concepts"

    @classmethod
    def contract(cls, options: MatchConceptsOptions) -> Contract:
        """Reads the column that the options name; the lists are its weights."""
        weights, modules = [], ["ahocorasick"] if options.rule == "substrings" else []
        if options.entries is not None:
            path = Path(options.entries).expanduser()
            _read(options.rule, path)
            kind = path.suffix.lower()  # the same bytes are another list when read in another way
            weights.append(Weights(f"entries{kind if kind in _KINDS else ''}", path=str(path)))
        elif options.rule == "synsets":
            modules.append("timm")
            weights.append(Weights("entries", path=str(_imagenet_ids() or "")))
        if options.entries is None or options.rule == "synsets":
            weights += [Weights(name, path=str(path)) for name, path in find_wordnet(options.wordnet).items()]
        return Contract(
            writes=parse_schema("concepts: list<string>, concepts_count: int32"),
            reads=(options.column,),
            weights=tuple(weights),
            needs=Needs(modules=tuple(modules), extra="concepts"),
        )

    def open(self, device: str) -> None:
        """Read the list, and WordNet where it is asked; the CPU does the work whatever the device."""
        given = self.options.entries and Path(self.options.entries).expanduser()
        if self.options.rule == "synsets":
            self._wordnet = WordNet(self.options.wordnet)
            self._numbers = {_number(e) for e in _read("synsets", given or _require_imagenet_ids())}
            return
        entries = _read("substrings", given) if given else WordNet(self.options.wordnet).synset_names()
        if self.options.lowercase:
            entries = list(dict.fromkeys(entry.lower() for entry in entries))
        self._matcher = EntryMatcher(entries)

    def compute(self, batch: Batch) -> Columns:
        """One list per caption."""
        find = self._synsets if self.options.rule == "synsets" else self._substrings
        found = [None if text is None else find(text) for text in batch[self.options.column]]
        return {
            "concepts": pa.array(found, pa.list_(pa.string())),
            "concepts_count": pa.array([None if f is None else len(f) for f in found], pa.int32()),
        }

    def _substrings(self, text: str) -> list[str]:
        return self._matcher.find(text[:LONGEST].lower() if self.options.lowercase else text)

    def _synsets(self, text: str) -> list[str]:
        first = (self._wordnet.first_synset(word) for word in text[:LONGEST].split())
        return list(dict.fromkeys(s for s in first if s is not None and _number(s) in self._numbers))


def _number(synset: str) -> int:
    return int(synset[1:])


def _imagenet_ids() -> Path | None:
    """Where timm's list lies; it is not imported, which would load torch."""
    spec = find_spec("timm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / _IMAGENET


def _require_imagenet_ids() -> Path:
    found = _imagenet_ids()
    assert found is not None, "plan asks for timm"
    return found


def _read(rule: str, path: Path) -> list[str]:
    """The entries of a file in their order, each once; RecipeError when there are none, or no ids for synsets."""
    try:
        found = path.stat()
        entries = _entries(path, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RecipeError(f"match_concepts.entries: cannot read {path} ({error})") from None
    if rule == "synsets":
        wrong = next((e for e in entries if not (len(e) == 9 and e[0].isalpha() and e[1:].isdecimal())), None)
        if wrong is not None:
            raise RecipeError(f"match_concepts.entries: {path} holds {wrong[:50]!r}, no synset id such as n02084071")
    return list(entries)


@lru_cache(4)
def _entries(path: Path, size: int, changed: int) -> tuple[str, ...]:
    """Cached while the file stays as it is."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = pq.read_table(path)
        kind = table.schema.field(0).type if table.num_columns == 1 else pa.null()
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"expected one column of text, not {', '.join(map(str, table.schema))}")
        lines = table.column(0).to_pylist()
    elif suffix == ".json":
        lines = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError("expected a list of texts")
    else:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    entries = tuple(dict.fromkeys(line.strip() for line in lines if line and line.strip()))
    if not entries:
        raise ValueError("it has no entry")
    return entries
