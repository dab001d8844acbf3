"""MinHash of a caption: a signature whose places agree as often as two captions are alike."""

from __future__ import annotations

import pyarrow as pa
from pydantic import Field, field_validator

from mmdata.batch import Batch
from mmdata.models.minhash import signatures
from mmdata.models.offline import package_weights
from mmdata.models.shingles import Normal, Shingling, Unit, shingle
from mmdata.stage import Columns, Contract, Needs, Options, Stage, TextColumn

__all__ = ["HashText", "HashTextOptions"]

_STEPS: tuple[Normal, ...] = ("nfkc", "lower", "punctuation", "whitespace")


class HashTextOptions(Options):
    """Which text, what counts as the same in it, and how long its signature is."""

    column: TextColumn = Field("caption", description="text column to hash")
    unit: Unit = Field("characters", description="what a shingle is made of")
    size: int = Field(5, ge=1, le=64, description="units in a shingle")
    normalise: tuple[Normal, ...] = Field(
        _STEPS, description="what is made alike first, always in this order: nfkc, lower, punctuation, whitespace"
    )
    permutations: int = Field(128, ge=8, le=1024, description="numbers in a signature, of 4 bytes each")
    seed: int = Field(
        1, ge=0, lt=2**63, description="which hash functions: compare those of one seed; default: the recipe's"
    )

    @field_validator("normalise")
    @classmethod
    def _in_order(cls, value: tuple[Normal, ...]) -> tuple[Normal, ...]:
        return tuple(step for step in _STEPS if step in value)  # written in another order it is the same question


class HashText(Stage[HashTextOptions]):
    """MinHash signature of a caption, over its shingles: runs of five characters unless told otherwise.

    Reads the caption (or `column`). It is normalised first, as `normalise` says, in this order: `nfkc` (Unicode's
    compatibility composition), `lower`, `punctuation` (each code point of the categories P and S becomes a space),
    `whitespace` (a run of white space becomes one space, none at the ends). Its shingles are all runs of `size`
    characters (Unicode code points), or words (what white space parts); repeated ones count once, order does not
    count. A caption shorter than one shingle is itself its only one. Of a longer one than 10,000 code points only
    those are looked at.

    Writes `minhash`, a fixed-size list of `permutations` uint32 in a set of its own, as embeddings are (not in
    `samples`, 512 bytes a row). The share of places in which two signatures agree estimates the Jaccard similarity of
    their shingle sets without bias, with a standard deviation of at most √(J(1−J)/permutations): 0.035 at 0.8. NULL
    without a reason: the caption is NULL, or nothing is left of it once it is normalised. Give it to
    `minhash_duplicates`.

    Source: Broder 1997; shingles of five characters for short texts as in Leskovec, Rajaraman and Ullman, Mining of
    Massive Datasets, section 3.2.2; signatures by rensa (Fast Similarity Sketching, Dahlgaard et al. 2017).
    """

    name = "hash_text"
    version = 1
    label = "text_hash"

    @classmethod
    def contract(cls, options: HashTextOptions) -> Contract:
        """Reads the column that the options name; the version of rensa is part of the identity."""
        return Contract(
            writes=pa.schema([("minhash", pa.list_(pa.uint32(), options.permutations))]),
            reads=(options.column,),
            weights=(package_weights("rensa"),),
            needs=Needs(modules=("rensa", "xxhash"), extra="minhash"),
        )

    def compute(self, batch: Batch) -> Columns:
        """One signature per caption that has a shingle."""
        options = self.options
        texts = batch.table.column(options.column)
        how = Shingling(options.unit, options.size, options.normalise)
        found, has_any = signatures(shingle(texts, how), options.permutations, options.seed)
        kind = pa.list_(pa.uint32(), options.permutations)
        values = pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), type=kind, mask=pa.array(~has_any))
        return {"minhash": values}
