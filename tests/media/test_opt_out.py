"""X-Robots-Tag and TDM-Reservation, as their specifications write them and as servers send them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdata.media.opt_out import opted_out, product_token
from mmdata.settings import FetchOptions

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DEFAULT = FetchOptions().disallowed_header_directives


def refusal(*tags: str, directives: tuple[str, ...] = DEFAULT, agent: str = "mmdata") -> str | None:
    return opted_out(tags, None, agent, directives, True, NOW)


REFUSED = [
    "noai",
    "NOAI",
    " noimageai ",
    "noindex, nofollow",
    "nofollow,noindex",
    "none",
    "noml",
    "noimageindex",
    # what img2dataset 1.47.0 misses: it takes all before the first colon for an agent
    "noai, max-image-preview:large",
    "max-snippet: 20, noai",
    "noindex, unavailable_after: 25 Jun 2099 15:00:00 PST",
    "max-image-preview: large, max-video-preview: -1, noai",
    # for us, for everybody, for us among others
    "mmdata: noindex",
    "MMData: noai",
    "mmdata/0.1: noai",
    "*: noai",
    "mmdata: max-snippet: 20, noai",
    "googlebot: nofollow, mmdata: noindex",
    # dates: the examples of Google's page, and the other two spellings it names
    "unavailable_after: 25 Jun 2010 15:00:00 PST",
    "unavailable_after: Friday, 25-Jun-10 15:00:00 UTC",
    "unavailable_after: Fri, 25 Jun 2010 15:00:00 GMT, nofollow",
    "unavailable_after: 2010-06-25T15:00:00Z",
    "unavailable_after: 2010-06-25",
    "mmdata: unavailable_after: 25 Jun 2010 15:00:00 PST",
    "nofollow, unavailable_after: 2026-06-01T01:00:00+02:00",  # an hour before NOW
    # a directive nobody knows is no agent
    "content-usage: train=n, noai",
    "max-future: 3, noai",
    "noai: yes",
]
USED = [
    "",
    "all",
    "nofollow",
    "noarchive, nosnippet, max-snippet:0",
    "googlebot: noindex",
    "googlebot: noindex, noai",  # the list belongs to the agent before it
    "otherbot/2.1: none",
    "mmdata-image: noai",
    "unavailable_after: 25 Jun 2099 15:00:00 PST",
    "unavailable_after: 2099-06-25",
    "unavailable_after: someday",
    "unavailable_after:",
    "unavailable_after: Friday",
    "unavailable_after: 99999-99-99",
    "googlebot: unavailable_after: 25 Jun 2010 15:00:00 PST",
    "nofollow, unavailable_after: 2026-06-01T03:00:00+02:00",  # an hour after NOW
    "noaix, xnoai, no ai",
    "::, ,;=",
]


@pytest.mark.parametrize("tag", REFUSED)
def test_these_refuse(tag: str) -> None:
    words = refusal(tag)
    assert words is not None
    assert words.startswith("X-Robots-Tag: ")
    assert len(words) < 100
    assert refusal("all", "nofollow", tag) == words  # wherever among several headers
    assert refusal(tag, directives=()) is None


@pytest.mark.parametrize("tag", USED)
def test_these_do_not(tag: str) -> None:
    assert refusal(tag) is None
    assert refusal(tag, "noai") == "X-Robots-Tag: noai"  # nor do they hide the next header


def test_the_words_say_what_was_said() -> None:
    assert refusal("max-snippet:1, NoAI") == "X-Robots-Tag: noai"
    assert refusal("mmdata: none") == "X-Robots-Tag: none for mmdata"
    assert refusal("unavailable_after: 2010-06-25") == "X-Robots-Tag: unavailable_after, which has passed"


def test_which_directives_refuse_is_an_option() -> None:
    assert refusal("noai", directives=("noindex",)) is None
    assert refusal("nosnippet", directives=("NoSnippet",)) == "X-Robots-Tag: nosnippet"
    # `none` stands for noindex and nofollow; a date that has passed, for noindex
    assert refusal("none", directives=("nofollow",)) is not None
    assert refusal("none", directives=("noai",)) is None
    assert refusal("unavailable_after: 2010-06-25", directives=("noai",)) is None
    assert refusal("unavailable_after: 2010-06-25", directives=("unavailable_after",)) is not None


def test_tdm_reservation() -> None:
    def reserved(value: str | None, respect: bool = True) -> str | None:
        return opted_out([], value, "mmdata", DEFAULT, respect, NOW)

    assert reserved("1") == reserved(" 1 ") == reserved("1, 1") == "tdm-reservation: 1"
    assert [reserved(v) for v in (None, "", "0", "2", "yes", "10")] == [None] * 6
    assert reserved("1", respect=False) is None
    assert opted_out([], "1", "mmdata", (), True, NOW) == "tdm-reservation: 1"


@pytest.mark.parametrize(
    ("user_agent", "token"),
    [
        (None, "mmdata"),
        ("", "mmdata"),
        ("mmdata/0.1 (+https://example.org)", "mmdata"),
        ("PetBot (+https://example.org)", "petbot"),
        ("img2dataset", "img2dataset"),
        ("Mozilla/5.0 (compatible; PetBot/2.0; +https://example.org)", "petbot"),
        ("Mozilla/5.0 (X11; rv:72.0) Gecko/20100101 Firefox/72.0 (compatible; cats; +https://a.test)", "cats"),
        ("Mozilla/5.0 (X11; rv:72.0) Gecko/20100101 Firefox/72.0", "mozilla"),
    ],
)
def test_the_token_of_a_user_agent(user_agent: str | None, token: str) -> None:
    assert product_token(user_agent) == token


PIECES = st.sampled_from(
    ["noai", "all", ":", ",", " ", "mmdata", "unavailable_after", "Fri", "25 Jun 2010", "-0001", "9" * 30]
)


@given(
    st.lists(st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=12).map("".join)), max_size=4),
    st.text(max_size=5),
)
def test_whatever_is_sent_is_read_and_a_plain_refusal_beside_it_is_seen(tags: list[str], tdm: str) -> None:
    first = opted_out(tags, tdm, "mmdata", DEFAULT, True, NOW)
    assert first is None or len(first) < 100
    assert opted_out([*tags, "noai"], tdm, "mmdata", DEFAULT, True, NOW) in (first, "X-Robots-Tag: noai")
