"""What a caption is, by any text classifier of transformers."""

from __future__ import annotations

from pydantic import Field

from mmdata.batch import Batch
from mmdata.models.classifiers import TextLabels
from mmdata.models.pretrained import Precision, bring_folder, folder_here, labels_of, pretrained_weights, read_json
from mmdata.stage import Columns, Contract, FilePath, Needs, Options, Stage, TextColumn
from mmdata.stages.label_columns import label_cells, label_schema, require_labels

__all__ = ["ClassifyText", "ClassifyTextOptions"]

_ROWS = 16
_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


class ClassifyTextOptions(Options):
    """Which model, over which text, and which of its labels become columns."""

    model: FilePath = Field(
        description="folder that transformers' save_pretrained wrote, or a hub name with `revision`"
    )
    revision: str | None = Field(None, description="commit of a hub's model, 40 hex digits")
    column: TextColumn = Field("caption", description="text column to classify")
    labels: tuple[str, ...] = Field((), description="labels that get a column of their own, with their score")
    top: int = Field(5, ge=1, description="how many of the best labels are listed")
    max_tokens: int | None = Field(None, ge=1, description="tokens a text is cut at; the model's own limit if left out")
    precision: Precision = Field("fp32", description="number format of the weights and of most sums")


class ClassifyText(Stage[ClassifyTextOptions]):
    """Labels of a caption by any transformers text classifier: toxicity, quality, topic.

    Reads the caption (or `column`). Writes `classify_text_label`, the best label; `classify_text_score`, its score,
    float32; `classify_text_top`, a list of the `top` best labels and scores, best first; and for each of `labels` its
    score as `classify_text_<label>`, the label in lower case with `_` for what is no letter or digit. A score is a
    probability in [0, 1]: over all labels, or of each label alone where the model's configuration says so or it has
    but one; of a regression it is the bare number. NULL without a reason: the caption is NULL, or has no token; an
    empty caption has the scores of an empty text where the tokenizer puts marks of its own around it, as BERT's does.

    A caption is cut at `max_tokens`, by default the model's own limit (often 512), and of one that is longer than 40
    characters for each of these tokens the rest is not looked at. Weights that lack the classifier's layers are
    refused, and code beside them is never run.
    Source: transformers' text-classification pipeline, whose scores these are.
    """

    name = "classify_text"
    version = 1
    label = "classify_text"

    @classmethod
    def contract(cls, options: ClassifyTextOptions) -> Contract:
        """Columns as `labels` says; RecipeError for a model that is not there, and for a label it does not have."""
        weights = pretrained_weights(cls.name, options.model, options.revision)
        folder = folder_here(options.model, options.revision)
        if folder is not None and options.labels:
            require_labels(cls.name, options.labels, labels_of(cls.name, read_json(cls.name, folder, "config.json")))
        return Contract(
            writes=label_schema(cls.name, options.labels),
            reads=(options.column,),
            batch_shape=_ROWS,
            precision=options.precision,
            weights=weights,
            needs=Needs(modules=("torch", "transformers"), extra="models", gpu=0.25),
            tolerance=_TOLERANCE[options.precision],
        )

    def open(self, device: str) -> None:
        """Load the model and run one full batch of the longest texts."""
        options = self.options
        folder = bring_folder(self.name, options.model, options.revision)
        rows = self.batch_shape or _ROWS
        self._model = TextLabels(self.name, folder, options.precision, device, rows, options.max_tokens)
        require_labels(self.name, options.labels, self._model.labels)
        self._model.warm_up()

    def compute(self, batch: Batch) -> Columns:
        """One score per label and caption."""
        captions = batch[self.options.column]
        there = [i for i, text in enumerate(captions) if text is not None]
        seen, scores = self._model.scores([captions[i] for i in there])
        rows = [there[i] for i in seen]
        asked, top = self.options.labels, self.options.top
        return label_cells(self.name, self._model.labels, asked, top, scores, rows, len(captions))
