r"""Personal data in a text: presidio's recognisers with their checks, names of persons by spaCy. No network.

In: texts. Out: per text the spans of what was found, none overlapping another. The recognisers check what a pattern
finds: a card's Luhn digit, an IBAN's country and check digits, an address's syntax, a mail address's public suffix
(from the list inside tldextract), a telephone number's plan (libphonenumber). The patterns of mail, IP and web
addresses are ours: presidio's take time in the square of a text's length, cut an IPv6 address short, and call file
names web addresses. `\b` finds no word boundary between a Chinese letter and a digit: a text that is not ASCII is
looked at twice, the second time with its other letters blanked out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from mmdata.models.english import LONGEST, EnglishPipeline, english_weights
from mmdata.models.offline import package_weights
from mmdata.stage import Weights

__all__ = ["DEFAULT_REGIONS", "Kind", "PersonalData", "Span", "finder_weights", "unknown_regions"]

Kind = Literal["email", "iban", "credit_card", "ip", "phone", "url", "person"]  # of equally long spans the first counts
Span = tuple[int, int, Kind]  # [start, stop) in code points

KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_REGIONS = ("US",)
_MARGIN = 200  # code points beyond the cut, so that what straddles it is recognised
_LEAST_SCORE = 0.3  # of presidio's, in [0, 1]: what a check refused has 0, what it confirmed 1
_DIGIT = re.compile(r"\d")
_FOREIGN_LETTER = re.compile(r"[^\W_]", re.UNICODE)
_LEAST_DIGITS = {"iban": 2, "credit_card": 13, "ip": 1, "phone": 6}  # fewer: nothing to find, and no need to look
_MARKS = {"email": "@", "url": ".", "ip": ".:"}

_LOCAL, _LABEL = r"[\w.!#$%&'*+/=?^`{|}~-]", r"[\w-]"
_EMAIL = (
    rf"(?<!{_LOCAL}){_LOCAL}{{1,64}}@(?:{_LABEL}{{1,63}}\.){{1,8}}[^\W\d_]{{2,24}}(?!{_LABEL})",
    r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])",
)
_IP = (
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)",
    # two colons and a digit somewhere; `::` alone is syntax, not an address
    r"(?<![\w:.])(?=[0-9A-Fa-f:]{0,39}\d)(?:[0-9A-Fa-f]{0,4}:){2,8}(?:[0-9A-Fa-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])",
)
_URL = (
    r"(?:\b(?:https?|ftp)://|\bwww\d{0,3}\.)[^\s<>\"'\u3000-\u303f\uff00-\uffef]{0,2000}[^\s<>\"'.,;:!?)\]\u3000-\u303f\uff00-\uffef]",
)


def finder_weights(kinds: Sequence[Kind]) -> tuple[Weights, ...]:
    """The packages whose tables decide what these kinds find."""
    packages = ["presidio-analyzer"]
    packages += ["tldextract"] if "email" in kinds else []
    packages += ["phonenumbers"] if "phone" in kinds else []
    return (*map(package_weights, packages), *([english_weights()] if "person" in kinds else []))


def unknown_regions(regions: Sequence[str]) -> list[str]:
    """Those that libphonenumber has no numbering plan for; none where it is not installed."""
    if tuple(regions) == DEFAULT_REGIONS:
        return []
    try:
        import phonenumbers
    except ImportError:
        return []
    return [region for region in regions if region not in phonenumbers.SUPPORTED_REGIONS]


class PersonalData:
    """The recognisers of the kinds asked for; telephone numbers as written in `regions`, or after a + anywhere."""

    def __init__(self, kinds: Sequence[Kind], regions: Sequence[str]) -> None:
        self._recognizers: dict[Kind, Any] = {kind: _recognizer(kind, regions) for kind in kinds if kind != "person"}
        self._persons = EnglishPipeline("persons") if "person" in kinds else None

    def spans(self, texts: Sequence[str]) -> list[list[Span]]:
        """What stands in the first `LONGEST` code points of each text, in order; overlapping finds are one span."""
        persons = self._persons.persons(texts) if self._persons else [[] for _ in texts]
        found = []
        for text, names in zip(texts, persons, strict=True):
            spans: list[Span] = [(start, stop, "person") for start, stop in names]
            found.append(_apart([*spans, *self._patterns(text[: LONGEST + _MARGIN])]))
        return found

    def _patterns(self, text: str) -> list[Span]:
        digits = len(_DIGIT.findall(text))
        wanted = [kind for kind in self._recognizers if _worthwhile(kind, text, digits)]
        if not wanted:
            return []
        spans = [span for kind in wanted for span in self._find(kind, text)]
        if not text.isascii():
            blanked = _FOREIGN_LETTER.sub(lambda found: found[0] if found[0].isascii() else " ", text)
            spans += [span for kind in wanted for span in self._find(kind, blanked)]
        return spans

    def _find(self, kind: Kind, text: str) -> list[Span]:
        found = self._recognizers[kind].analyze(text, self._recognizers[kind].supported_entities, None)
        return [(each.start, each.end, kind) for each in found if each.score >= _LEAST_SCORE]


def _worthwhile(kind: Kind, text: str, digits: int) -> bool:
    return digits >= _LEAST_DIGITS.get(kind, 0) and (kind not in _MARKS or any(mark in text for mark in _MARKS[kind]))


def _apart(spans: list[Span]) -> list[Span]:
    """Spans that overlap become one, called after the longest of them."""
    clusters: list[list[Span]] = []
    stop = -1
    for span in sorted(spans):
        if span[0] < stop:
            clusters[-1].append(span)
        else:
            clusters.append([span])
        stop = max(stop, span[1])
    merged = []
    for cluster in clusters:
        longest = max(cluster, key=lambda span: (span[1] - span[0], -KINDS.index(span[2])))
        merged.append((cluster[0][0], max(span[1] for span in cluster), longest[2]))
    return merged


def _recognizer(kind: Kind, regions: Sequence[str]) -> Any:
    from presidio_analyzer import Pattern, PatternRecognizer, predefined_recognizers

    def patterns(expressions: Sequence[str]) -> list[Any]:
        return [Pattern(f"{kind} {number}", text, 0.5) for number, text in enumerate(expressions)]

    if kind == "email":
        return _email_recognizer(patterns(_EMAIL))
    if kind == "iban":
        return predefined_recognizers.IbanRecognizer()
    if kind == "credit_card":
        return predefined_recognizers.CreditCardRecognizer()
    if kind == "ip":
        return predefined_recognizers.IpRecognizer(patterns=patterns(_IP))
    if kind == "phone":
        return predefined_recognizers.PhoneRecognizer(supported_regions=tuple(regions))
    return PatternRecognizer("URL", patterns=patterns(_URL))


def _email_recognizer(patterns: list[Any]) -> Any:
    """Presidio's, with the list of public suffixes that comes inside tldextract: its own fetches a newer one."""
    import tldextract
    from presidio_analyzer.predefined_recognizers import EmailRecognizer

    suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)

    class OfflineEmailRecognizer(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return bool(suffixes(pattern_text).fqdn)

    return OfflineEmailRecognizer(patterns=patterns)
