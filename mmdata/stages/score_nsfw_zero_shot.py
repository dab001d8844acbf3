"""LAION-400M's rules for unsafe pictures: a CLIP embedding against the names of categories."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, field_validator

from mmdata.batch import Batch
from mmdata.errors import RecipeError
from mmdata.models.clip import bring_weights, embedding_size, prompt_embeddings, weights_of
from mmdata.models.vectors import require_embedding, require_width, unit_rows
from mmdata.stage import ColumnName, Columns, Contract, Needs, Options, Stage, TextColumn, parse_schema

__all__ = ["ScoreNsfwZeroShot", "ScoreNsfwZeroShotOptions"]

# LAION's own lists are not reproduced here: these are ours, and a recipe may name others.
_NSFW = ("nudity", "pornography", "erotica", "a sexual act", "adult content")
_SAFE = (
    *("a landscape", "a portrait", "people in daily life", "an animal", "a plant", "food", "a building", "a room"),
    *("a vehicle", "clothes", "a product for sale", "an advertisement", "a logo", "a page of text", "a diagram"),
    *("a drawing", "a painting", "sports", "a toy", "a machine", "a medical picture", "a concert"),
)
_MINOR_WORDS = (
    *("baby", "babies", "infant", "infants", "toddler", "toddlers", "child", "children", "kid", "kids", "boy", "boys"),
    *("girl", "girls", "teen", "teens", "teenager", "teenagers", "teenage", "preteen", "schoolgirl", "schoolgirls"),
    *("schoolboy", "schoolboys", "minor", "minors", "underage", "under-age", "juvenile", "young"),
)
_MINOR = ("a baby", "a toddler", "a child", "a schoolchild", "a teenager")
_ADULT = ("an adult", "a middle-aged person", "an old person", "nobody", "an object")
_ANIMAL = ("a dog", "a cat", "a horse", "a farm animal", "a wild animal", "a bird", "a fish", "an insect")
_NO_ANIMAL = ("a person", "several people", "an object", "a place", "food", "a text", "a drawing")
_STATES = ("UNLIKELY", "UNSURE", "NSFW")  # by how many of the best two categories are unsafe


class ScoreNsfwZeroShotOptions(Options):
    """Which CLIP made the embeddings, and which words they are compared with."""

    model: str = Field(
        "ViT-B-32-quickgelu", description="open_clip architecture that made the embeddings, or local-dir:PATH"
    )
    pretrained: str = Field("openai", description="its open_clip tag, or path of a checkpoint, as score_clip has it")
    embedding: ColumnName = Field("clip_image_embedding", description="column with the pictures' embeddings")
    column: TextColumn = Field("caption", description="text column in which words for minors are looked for")
    prompt: str = Field("{}", description="what each category is put into, at {}; as LAION did, nothing more")
    nsfw: tuple[str, ...] = Field(_NSFW, min_length=1, description="categories that are unsafe; our own list")
    safe: tuple[str, ...] = Field(_SAFE, min_length=2, description="categories that are not; our own list")
    minor_words: tuple[str, ...] = Field(
        _MINOR_WORDS, description="words and phrases for minors, matched whole, whatever the case; our own list"
    )
    minor: tuple[str, ...] = Field(_MINOR, min_length=1, description="categories of pictures of minors; our own list")
    adult: tuple[str, ...] = Field(_ADULT, min_length=2, description="categories of other pictures; our own list")
    animal: tuple[str, ...] = Field(_ANIMAL, min_length=1, description="categories of animals; our own list")
    no_animal: tuple[str, ...] = Field(_NO_ANIMAL, min_length=2, description="categories of the rest; our own list")

    @field_validator("prompt")
    @classmethod
    def _has_one_place(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError("expected a text with {} where the category goes, once")
        return value


class ScoreNsfwZeroShot(Stage[ScoreNsfwZeroShotOptions]):
    """Whether a picture is likely unsafe, by which category names its CLIP embedding is closest to.

    Reads the embedding that `score_clip` wrote with `embeddings: [image]`, and the caption (or `column`); `model` and
    `pretrained` must be the same there and here. No picture is decoded: the category names go through the text
    encoder once, when the stage is opened. Writes

    - `nsfw_label`: `NSFW` when both of the two closest categories are unsafe, `UNSURE` when one is, else `UNLIKELY`;
    - `nsfw_top`: these two categories, the closest first;
    - `nsfw_minor_words`: whether a word of `minor_words` stands in the caption;
    - `nsfw_minor_image`: whether one of the two closest of `minor` and `adult` is of `minor`;
    - `nsfw_animal_image`: the same of `animal` and `no_animal`.

    NULL without a reason: there is no embedding, or for `nsfw_minor_words` no caption. These are weak signals: LAION
    found 4 unsafe pictures of 12 by its rule, with 73 false alarms, among 3,456. Words are English unless you name
    others, and are matched whole, which finds nothing inside text that is written without spaces.
    Source: LAION-400M (Schuhmann et al. 2021, arXiv 2111.02114) and its announcement, rules 6 to 10. How we differ: the
    lists are our own, for LAION publishes only examples of its own.
    """

    name = "score_nsfw_zero_shot"
    version = 1
    label = "nsfw"

    @classmethod
    def contract(cls, options: ScoreNsfwZeroShotOptions) -> Contract:
        """Reads the embedding and the caption; RecipeError for a model, a file or a list that cannot be used."""
        for one, other in (("nsfw", "safe"), ("minor", "adult"), ("animal", "no_animal")):
            named = (*getattr(options, one), *getattr(options, other))
            twice = sorted({n for n in named if named.count(n) > 1})
            if twice:
                raise RecipeError(f"{cls.name}: {twice[0]!r} is twice in {one} and {other}; a category has one side")
        return Contract(
            writes=parse_schema(
                "nsfw_label: string, nsfw_top: list<string>, nsfw_minor_words: bool, nsfw_minor_image: bool, "
                "nsfw_animal_image: bool"
            ),
            reads=(options.embedding, options.column),
            weights=weights_of(options.model, options.pretrained),
            needs=Needs(modules=("open_clip", "torch"), extra="clip"),
        )

    @classmethod
    def check_types(cls, options: ScoreNsfwZeroShotOptions, schema: pa.Schema) -> None:
        """RecipeError where `embedding` is no embedding, or one of another width than the model's."""
        super().check_types(options, schema)
        require_embedding(cls.name, options.embedding, schema)
        width = schema.field(options.embedding).type.list_size
        wanted = embedding_size(options.model)
        if wanted is not None and width > 1:  # 1: score_clip could not tell, without open_clip
            require_width(cls.name, options.embedding, width, wanted, f"model {options.model}")

    @classmethod
    def resolve_weights(cls, options: ScoreNsfwZeroShotOptions) -> dict[str, str]:
        """The sha256 of a tag's checkpoint, downloaded if need be; MissingExtra when it cannot be."""
        return bring_weights(options.model, options.pretrained)

    def open(self, device: str) -> None:
        """Put every category through the text encoder, on the CPU whatever the device."""
        options = self.options
        self._sets = [
            (options.nsfw, options.safe),
            (options.minor, options.adult),
            (options.animal, options.no_animal),
        ]
        prompts = [options.prompt.replace("{}", c) for wanted, rest in self._sets for c in (*wanted, *rest)]
        vectors = prompt_embeddings(options.model, options.pretrained, prompts).astype(np.float64)
        ends = np.cumsum([len(wanted) + len(rest) for wanted, rest in self._sets])
        self._vectors = np.split(vectors, ends[:-1])
        words = "|".join(re.escape(w.casefold()) for w in sorted(options.minor_words, key=len, reverse=True))
        self._words = re.compile(rf"(?<!\w)(?:{words})(?!\w)") if words else None

    def compute(self, batch: Batch) -> Columns:
        """Three comparisons per embedding, and a look at the caption."""
        column = self.options.embedding
        rows, vectors = unit_rows(batch.column(column))
        require_width(self.name, column, vectors.shape[1], self._vectors[0].shape[1], f"model {self.options.model}")
        label: list[str | None] = [None] * len(batch)
        top: list[list[str] | None] = [None] * len(batch)
        minor: list[bool | None] = [None] * len(batch)
        animal: list[bool | None] = [None] * len(batch)
        for row, vector in zip(rows.tolist(), vectors, strict=True):
            if not np.isfinite(vector).all():
                continue  # a vector of zeros has no direction
            unsafe, young, beast = (self._closest(vector, place) for place in range(3))
            label[row] = _STATES[sum(inside for _, inside in unsafe)]
            top[row] = [name for name, _ in unsafe]
            minor[row], animal[row] = any(i for _, i in young), any(i for _, i in beast)
        return {
            "nsfw_label": label,
            "nsfw_top": top,
            "nsfw_minor_words": [None if c is None else self._names_minor(c) for c in batch[self.options.column]],
            "nsfw_minor_image": minor,
            "nsfw_animal_image": animal,
        }

    def _closest(self, vector: npt.NDArray[np.float64], place: int) -> list[tuple[str, bool]]:
        """The two closest categories of a set, and whether each is of the ones that are looked for."""
        wanted, rest = self._sets[place]
        names: Sequence[str] = (*wanted, *rest)
        cosines = (self._vectors[place] * vector).sum(axis=1)
        best = np.argsort(-cosines, kind="stable")[:2].tolist()
        return [(names[i], i < len(wanted)) for i in best]

    def _names_minor(self, caption: str) -> bool:
        return self._words is not None and self._words.search(caption.casefold()) is not None
