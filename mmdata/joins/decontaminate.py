"""Rows that are also in evaluation sets: pictures that look alike, captions that share words, embeddings that are near.

What evaluation sets hold stands in memory: 16 bytes a hash or n-gram, 4 bytes a number of an embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from mmdata.errors import RecipeError
from mmdata.groups.hamming import close_between, distinct_in_order
from mmdata.joins.evaluation_sets import (
    Items,
    check_hash_lists,
    check_text_lists,
    embeddings_of,
    hashes_of,
    is_embedding,
    is_hash,
    ngrams_of,
    weights_of,
)
from mmdata.models.cosines import Rows, cosines_of, spans, take_better, unit_rows_of, vectors_of
from mmdata.models.shingles import Normal, Shingling, pieces, shingle
from mmdata.stage import (
    ColumnName,
    Columns,
    Contract,
    DatasetPath,
    FilePath,
    Group,
    GroupRows,
    Needs,
    Options,
    parse_schema,
)

__all__ = ["Decontaminate", "DecontaminateOptions"]

Positions = npt.NDArray[np.int64]
_ROWS = 4096  # embeddings compared at once


class DecontaminateOptions(Options):
    """The evaluation sets, which columns are compared with them, and how alike is too alike."""

    hash_lists: dict[str, FilePath] = Field(
        {}, description="name → file of phashes: 16 hex digits a line, a column `phash`, or .npy of uint64"
    )
    text_lists: dict[str, FilePath] = Field({}, description="name → file of texts: one a line, or a column `caption`")
    against: list[DatasetPath] = Field(
        [], description="evaluation sets that are dataset folders (`flickr`, or `flickr#test`): their kept rows count"
    )
    phash: ColumnName | None = Field(None, description="column of 64-bit hashes to compare, such as hash_image's phash")
    max_distance: int = Field(4, ge=0, le=16, description="bits in which a picture may differ and still match")
    caption: ColumnName | None = Field(None, description="text column to compare")
    ngram: int = Field(8, ge=1, le=64, description="words in a row that a caption must share to match")
    normalise: tuple[Normal, ...] = Field(
        ("nfkc", "lower", "punctuation", "whitespace"), description="what is made alike first, as for hash_text"
    )
    short_texts: bool = Field(
        False, description="whether texts of fewer words than an n-gram match where they are the same as a whole"
    )
    embedding: ColumnName | None = Field(None, description="column of embeddings to compare with those of `against`")
    min_cosine: float = Field(0.95, gt=0, le=1, description="cosine from which on an embedding matches")

    @model_validator(mode="after")
    def _compares_something(self) -> DecontaminateOptions:
        if not (self.hash_lists or self.text_lists or self.against):
            raise ValueError("name an evaluation set: hash_lists, text_lists or against")
        for lists, column in (("hash_lists", "phash"), ("text_lists", "caption")):
            if getattr(self, lists) and getattr(self, column) is None:
                raise ValueError(f"{lists} needs {column}: the column of the rows to compare with it")
        if not self.against and self.embedding is not None:
            raise ValueError("embedding is compared with that of datasets: name them with against")
        if self.against and not (self.phash or self.caption or self.embedding):
            raise ValueError("against needs a column to compare: phash, caption or embedding")
        return self

    @property
    def compared(self) -> list[str]:
        """The columns to compare."""
        return list(dict.fromkeys(c for c in (self.phash, self.caption, self.embedding) if c is not None))


class Decontaminate(Group[DecontaminateOptions]):
    """Rows whose picture, caption or embedding is in an evaluation set, by name.

    Reads `phash`, `caption` and `embedding`, those that the options name. A row matches an item of a set by its image
    when their hashes differ in at most `max_distance` bits; by its caption when they share any `ngram` words in a row,
    normalised as `normalise` says (texts with fewer words never match, or, with `short_texts`, where they are the same
    as a whole; of a longer text than 10,000 code points only those are looked at); by its embedding when their cosine
    is at least `min_cosine`. Sets are `hash_lists`, `text_lists` and the kept rows of the datasets of `against`, whose
    columns of the same names must be made in the same way.

    Writes `decontaminate_is_match` (NULL where the row has no value in any of these columns, so that nothing could be
    compared), `decontaminate_by` (`image`, else `caption`, else `embedding`), `decontaminate_set` (the name of the
    list, or the dataset as `against` names it), `decontaminate_of` (the item: its place in the list, from 1, empty
    lines not counted, or its key in the dataset) and `decontaminate_distance` (float32; image: bits; caption: share of
    its n-grams that no set has; embedding: 1 − cosine); these four are NULL for a row that does not match. The nearest
    item is named, of equally near ones the first; for captions the first that shares an n-gram. Keep the rest by
    filtering for `NOT decontaminate_is_match`.

    Flat pictures of any colour have one and the same pHash, and match one another.
    Source: n-grams as in Brown et al. 2020 (GPT-3), appendix C: lower case, no punctuation, 8 to 13 words by the
    length of a set's texts; 8 for captions. Pictures: COYO-700M removes those that match ImageNet-1K and -21K,
    Flickr30k, COCO, CC3M or CC12M by pHash; the distance is not published, so it is an option. ALIGN removes
    near-duplicates of test pictures, by a measure that could not be verified.
    """

    name = "decontaminate"
    version = 1
    label = "decontaminate"
    streams = True

    @classmethod
    def contract(cls, options: DecontaminateOptions) -> Contract:
        """Reads the columns that the options name; the lists must be there, and their content is in the identity."""
        names = ("is_match: bool", "by: string", "set: string", "of: string", "distance: float32")
        return Contract(
            writes=parse_schema(", ".join(f"{cls.label}_{n}" for n in names)),
            reads=tuple(options.compared),
            weights=weights_of(options.hash_lists, options.text_lists),
            needs=Needs(modules=("xxhash",), extra="minhash") if options.caption is not None else Needs(),
        )

    @classmethod
    def check_types(cls, options: DecontaminateOptions, schema: pa.Schema) -> None:
        """RecipeError for a column of another type; SourceError for a list with a value that is none."""
        wanted = {
            "phash": ("64-bit hashes", is_hash),
            "caption": ("text", pa.types.is_string),
            "embedding": ("embeddings", is_embedding),
        }
        for option, (what, fits) in wanted.items():
            column = getattr(options, option)
            if column is not None and not fits(schema.field(column).type):
                kind = schema.field(column).type
                raise RecipeError(f"decontaminate: {option} names {column!r}, which is of type {kind}, not {what}")
        check_hash_lists(options.hash_lists)
        check_text_lists(options.text_lists)

    def compute_streamed(self, rows: GroupRows, scratch: Path) -> Columns:
        """The match of each row."""
        found = _Matches(len(rows))
        if self.options.phash is not None:
            self._by_image(rows, found, self.options.phash)
        if self.options.caption is not None:
            self._by_caption(rows, found, self.options.caption)
        if self.options.embedding is not None:
            self._by_embedding(rows, found, self.options.embedding)
        return found.columns(self.label)

    def _by_image(self, rows: GroupRows, found: _Matches, name: str) -> None:
        theirs, numbers, items = hashes_of(self.options.hash_lists, name, rows.older)
        found.begin("image", items)
        column = rows.read([name]).column(name).combine_chunks()
        present = np.flatnonzero(column.is_valid())
        distinct, _, which = distinct_in_order(np.asarray(column.drop_null()).view(np.uint64))
        # Nearest first, then the item's number: as one number, for there are fewer than 2⁵⁶ items.
        best = np.full(len(distinct), _NEVER)
        for i, j in close_between(theirs, distinct, self.options.max_distance):
            bits = np.bitwise_count(theirs[i] ^ distinct[j]).astype(np.int64)
            np.minimum.at(best, j, (bits << _BITS) | numbers[i])
        hit = best[which] < _NEVER
        near = best[which][hit]
        found.add(present, present[hit], near & ((1 << _BITS) - 1), near >> _BITS)

    def _by_caption(self, rows: GroupRows, found: _Matches, name: str) -> None:
        options = self.options
        how = Shingling("words", options.ngram, options.normalise, options.short_texts)
        grams, numbers, items = ngrams_of(options.text_lists, name, how, rows.older)
        found.begin("caption", items)
        first = 0
        columns = (part.column(name).combine_chunks() for part in rows.parts([name]))
        for column in (c.slice(start, stop - start) for c in columns for start, stop in pieces(c)):
            own = shingle(column, how).sets()
            text = np.repeat(np.arange(len(column)), np.diff(own.offsets))
            at = np.searchsorted(grams, own.hashes)
            at[at == len(grams)] = 0
            hit = grams[at] == own.hashes if len(grams) else np.zeros(len(own.hashes), bool)
            best = np.full(len(column), _NEVER)
            np.minimum.at(best, text[hit], numbers[at[hit]])
            some = np.flatnonzero(best < _NEVER)
            known = np.bincount(text[hit], minlength=len(column))[some] / np.diff(own.offsets)[some]
            found.add(first + np.flatnonzero(column.is_valid()), first + some, best[some], 1 - known)
            first += len(column)

    def _by_embedding(self, rows: GroupRows, found: _Matches, name: str) -> None:
        theirs: Rows | None = None
        first = 0
        for part in rows.parts([name]):
            if theirs is None:
                width = part.schema.field(name).type.list_size
                theirs, numbers, items = embeddings_of(name, width, rows.older)
                found.begin("embedding", items)
            unit, there = unit_rows_of(vectors_of(part.column(name)))
            own, mine = unit[there], first + np.flatnonzero(there)
            first += len(part)
            found.add(mine, _NONE, _NONE, _NONE)
            for begin in range(0, len(own) if len(theirs) else 0, _ROWS):
                cosine, nearest = _nearest(own[begin : begin + _ROWS], theirs)
                near = cosine >= self.options.min_cosine
                found.add(_NONE, mine[begin : begin + _ROWS][near], numbers[nearest[near]], 1 - cosine[near])


_NONE = np.empty(0, np.int64)
_NEVER = np.iinfo(np.int64).max
_BITS = 56  # of an item's number


def _nearest(own: Rows, theirs: Rows) -> tuple[Rows, Positions]:
    """The highest cosine of each, 1 for equal rows, and the first that has it; 64 MB of products at a time."""
    best, at = np.full(len(own), -np.inf, np.float32), np.zeros(len(own), np.int64)
    for begin, end in spans(len(theirs), _ROWS):
        take_better(own @ theirs[begin:end].T, begin, best, at)
    return cosines_of(own, theirs[at]), at


class _Matches:
    """The match of every row, by position; what was found first stays."""

    def __init__(self, rows: int) -> None:
        self._compared = np.zeros(rows, bool)
        self._kinds: list[tuple[str, Items]] = []
        self._kind = np.full(rows, -1, np.int8)
        self._number = np.zeros(rows, np.int64)
        self._distance = np.zeros(rows, np.float32)

    def begin(self, by: str, items: Items) -> None:
        """What is added next was found in this way, among these items."""
        self._kinds.append((by, items))

    def add(self, compared: Positions, matched: Positions, numbers: Positions, distance: npt.NDArray[Any]) -> None:
        """Rows that had a value, and those that are so near to the items of these numbers."""
        self._compared[compared] = True
        new = self._kind[matched] < 0
        self._kind[matched[new]] = len(self._kinds) - 1
        self._number[matched[new]], self._distance[matched[new]] = numbers[new], distance[new]

    def columns(self, label: str) -> dict[str, pa.Array]:
        """As the group writes them."""
        by, sets, keys = (np.full(len(self._kind), None, object) for _ in range(3))
        for kind, (name, items) in enumerate(self._kinds):
            mine = np.flatnonzero(self._kind == kind)
            by[mine] = name
            sets[mine], keys[mine] = items.look_up(self._number[mine])
        matched = self._kind >= 0
        return {
            f"{label}_is_match": pa.array(matched, mask=~self._compared),
            f"{label}_by": pa.array(by, pa.string()),
            f"{label}_set": pa.array(sets, pa.string()),
            f"{label}_of": pa.array(keys, pa.string()),
            f"{label}_distance": pa.array(self._distance, mask=~matched),
        }
