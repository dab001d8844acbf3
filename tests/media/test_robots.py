"""robots.txt: the examples of RFC 9309 and of Google's page on it, hostile files, and the cache of them."""

from __future__ import annotations

import resource
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdata.media.robots import MAX_ROBOTS_BYTES, TTL_S, RobotsCache, Rules

SITE = "http://example.com"


def refused(text: str | bytes, path: str, agent: str = "mmdata") -> bool:
    body = text.encode() if isinstance(text, str) else text
    words = Rules.parse(200, body).refusal(SITE + path, agent)
    kept = Rules.parse(200, body, agent)
    assert kept.refusal(SITE + path, agent) == words
    assert words is None or words == f"robots.txt disallows it for {agent}"
    return words is not None


# RFC 9309, section 5.1
SIMPLE = """User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""


@pytest.mark.parametrize(
    ("agent", "path", "is_refused"),
    [
        ("mmdata", "/a/b.gif", True),
        ("mmdata", "/a/b.gif?x", False),
        ("mmdata", "/example/x", True),
        ("mmdata", "/publications/x", False),
        ("mmdata", "/", False),
        ("foobot", "/publications/x", True),
        ("FooBot", "/example/page.html", False),
        ("foobot", "/example/allowed.gif", False),
        ("barbot", "/example/page.html", True),
        ("bazbot", "/example/page.html", True),
        ("barbot", "/example/", False),
        ("quxbot", "/example/", False),  # a group without rules allows everything
        ("foo", "/example/x", True),  # a part of a name is another name
    ],
)
def test_the_simple_example_of_the_rfc(agent: str, path: str, is_refused: bool) -> None:
    assert refused(SIMPLE, path, agent) == is_refused


def test_groups_are_merged_as_in_the_rfc() -> None:
    """Section 2.2.1: two groups of one agent are one, and a group speaks to several."""
    text = "user-agent: ExampleBot\ndisallow: /foo\ndisallow: /bar\n\nuser-agent: ExampleBot\ndisallow: /baz\n"
    assert [refused(text, p, "examplebot") for p in ("/foo", "/bar", "/baz", "/qux")] == [True, True, True, False]
    both = "user-agent: *\nuser-agent: a\nallow: /x/y\ndisallow: /x\nsitemap: http://a.test/\ndisallow: /z\n"
    assert [refused(both, p, "a") for p in ("/x/y", "/x", "/z")] == [False, True, True]
    # Section 2.2.4: other records, such as Sitemap, end no group and nothing of ours
    among = "User-agent: mmdata\nSitemap: http://a.test/s.xml\nUser-agent: other\nDisallow: /\n"
    assert refused(among, "/x")
    assert refused(among, "/x", "other")


# Google Search Central, "How Google interprets the robots.txt specification": order of precedence of rules
PRECEDENCE = [
    ("Allow: /p\nDisallow: /", "/page", False),
    ("Allow: /folder\nDisallow: /folder", "/folder/page", False),
    ("Allow: /page\nDisallow: /*.htm", "/page.htm", True),
    ("Allow: /page\nDisallow: /*.ph", "/page.php5", False),
    ("Allow: /$\nDisallow: /", "/", False),
    ("Allow: /$\nDisallow: /", "/page.htm", True),
    # its table of path matches
    ("Disallow: /fish", "/fish.html", True),
    ("Disallow: /fish", "/Fish.asp", False),
    ("Disallow: /fish/", "/fish", False),
    ("Disallow: /fish/", "/fish/?id=anything", True),
    ("Disallow: /*.php", "/folder/filename.php?parameters", True),
    ("Disallow: /*.php$", "/filename.php?parameters", False),
    ("Disallow: /fish*.php", "/fishheads/catfish.php?parameters", True),
    # RFC 9309, section 2.2.2: octets in percent-encoding and without are the same
    ("Disallow: /foo/bar?baz=https://foo.bar", "/foo/bar?baz=https%3A%2F%2Ffoo.bar", False),
    ("Disallow: /foo/bar/\u30c4", "/foo/bar/%E3%83%84", True),
    ("Disallow: /foo/bar/%E3%83%84", "/foo/bar/%E3%83%84", True),
    ("Disallow: /foo/bar/%62%61%7A", "/foo/bar/baz", True),
]


@pytest.mark.parametrize(("lines", "path", "is_refused"), PRECEDENCE)
def test_the_longest_rule_counts(lines: str, path: str, is_refused: bool) -> None:
    assert refused(f"User-agent: *\n{lines}\n", path) == is_refused


@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        ("User-agent: *\nDisallow: /", True),
        ("\ufeffUser-agent: *\nDisallow: /", True),
        (b"\xff\xfe junk\x80\n\0\0User-agent: *\r\nDisallow: /\xff", False),
        (b"\xff\xfe junk\x80\n\0\0User-agent: *\r\nDisallow: /x", True),
        ("User-agent: *\rDisallow: /\r", True),
        ("  USER-AGENT :  *  # all\n\n\nDISALLOW :/ # all\n", True),
        ("user agent *\ndisalow /", True),
        ("User-agent: mmdata/1.0\nDisallow: /", True),
        ("User-agent: mmdata* (all of it)\nDisallow: /", True),
        ("User-agent: MMDATA\nDisallow: /", True),
        ("User-agent: mm\nUser-agent: mmdata-image\nUser-agent: xmmdata\nDisallow: /", False),
        ("User-agent: mmdata\nDisallow:\n\nUser-agent: *\nDisallow: /", False),
        ("User-agent: mmdata\nCrawl-delay: 1\n\nUser-agent: *\nDisallow: /", False),
        ("Disallow: /", False),  # of no group
        ("", False),
        ("<!DOCTYPE html><html><body>User-agent: * Disallow: / sold out</body></html>", False),
        ("\n" * 50 + "User-agent: *\nDisallow: /", True),
    ],
)
def test_how_it_may_be_written(text: str | bytes, is_refused: bool) -> None:
    assert refused(text, "/x") == is_refused


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 410])
def test_no_file_allows_everything(status: int) -> None:
    assert Rules.parse(status, b"User-agent: *\nDisallow: /").refusal(SITE + "/", "mmdata") is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_broken_server_allows_nothing(status: int) -> None:
    rules = Rules.parse(status, b"")
    assert rules.refusal(SITE + "/", "mmdata") == f"robots.txt: HTTP {status}"
    assert rules.crawl_delay_s("mmdata") is None


def test_crawl_delay() -> None:
    def delay(text: str, agent: str = "mmdata") -> float | None:
        return Rules.parse(200, text.encode(), agent).crawl_delay_s(agent)

    assert delay("User-agent: *\nCrawl-delay: 2.5") == 2.5
    assert delay("User-agent: *\nCrawl-delay: 9\nUser-agent: mmdata\nCrawl-delay: 1") == 1
    assert delay("User-agent: *\nCrawl-delay: 9\nUser-agent: mmdata\nDisallow: /x") is None
    assert delay("User-agent: *\nCrawl-delay: 999999") == 3600
    junk = ["-1", "nan", "inf", "0", "", "soon", "1e999", "9" * 5000]
    assert [delay(f"User-agent: *\nCrawl-delay: {j}\nDisallow: /y") for j in junk] == [None] * 8


def test_only_the_first_500_kib_count() -> None:
    start = b"User-agent: *\nDisallow: /a\n"
    body = start + b"#" * (MAX_ROBOTS_BYTES - len(start) - 1) + b"\nDisallow: /b\n"
    assert refused(body, "/a")
    assert not refused(body, "/b")


def test_rules_kept_for_one_agent_are_small_and_answer_for_it_alone() -> None:
    text = "".join(f"User-agent: bot{n}\nDisallow: /{n}\n" for n in range(2000)) + "User-agent: mmdata\nDisallow: /x\n"
    kept = Rules.parse(200, text.encode(), "mmdata")
    assert kept.refusal(SITE + "/x", "MMData") is not None
    assert kept.size < 5000 < Rules.parse(200, text.encode()).size
    with pytest.raises(ValueError, match="kept for mmdata"):
        kept.refusal(SITE + "/x", "other")


HOSTILE = {
    "agents times rules": b"".join(b"User-agent: x%d\n" % n for n in range(15_000))
    + b"User-agent: mmdata\n"
    + b"".join(b"Disallow:/%d\n" % n for n in range(9_000)),
    "one group again and again": b"User-agent: mmdata\n" * 26_000 + b"Disallow: /y\n",
    "wildcards": b"User-agent: *\n" + (b"Disallow: /" + b"*a" * 220 + b"*b$\n") * 1_000,
    "one long rule": b"User-agent: *\nDisallow: /" + b"*a" * 250_000,
    "percent": b"User-agent: *\nDisallow: /" + b"%" * 500_000,
    "spaces": b"User-agent" + b" " * 500_000,
    "newlines": b"\r\n" * 250_000,
    "no end": b"a" * 500_000,
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_files_cost_little(name: str) -> None:
    """Bounds of a machine ten times as slow as any: without them the first alone takes minutes and 20 GB."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    rules = Rules.parse(200, HOSTILE[name], "mmdata")
    for number in range(20):
        words = rules.refusal(f"{SITE}/{'a' * 2000}{number}", "mmdata")
        assert (words is not None) == ("wildcards" in name or "long" in name)
    assert time.process_time() - started < 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < 60  # MiB
    assert rules.size < 8 << 20


def test_too_many_rules_refuse_and_say_so() -> None:
    for lines in (b"Disallow: /a\n" * 10_001, b"Disallow: /*\n" * 2_001):
        words = Rules.parse(200, b"User-agent: *\n" + lines).refusal(SITE + "/b", "mmdata")
        assert words == f"robots.txt has too many rules to be followed: {lines.count(b'D')}"


LINES = st.sampled_from(
    ["User-agent: *", "User-agent: mmdata", "Allow: /a", "Disallow: /*b$", "Crawl-delay: 3", "Sitemap: x"]
)


@given(st.lists(st.one_of(LINES, st.text(max_size=30)), max_size=20).map("\n".join), st.text(max_size=30))
def test_whatever_stands_there_is_read(text: str, path: str) -> None:
    rules = Rules.parse(200, text.encode("utf-8", "surrogatepass"))
    words = rules.refusal(f"{SITE}/{path}", "mmdata")
    assert words is None or words.startswith("robots.txt disallows it")
    delay = rules.crawl_delay_s("mmdata")
    assert delay is None or 0 < delay <= 3600


def test_the_cache_keeps_rules_for_a_day() -> None:
    now = [1000.0]
    cache = RobotsCache(clock=lambda: now[0])
    rules = Rules.parse(200, b"", "mmdata")
    assert cache.get("http://a.test:80") is None
    cache.put("http://a.test:80", rules)
    now[0] += TTL_S - 1
    assert cache.get("http://a.test:80") is rules
    assert cache.get("https://a.test:443") is None
    now[0] += 1
    assert cache.get("http://a.test:80") is None


def test_the_cache_is_bounded_in_bytes_and_forgets_the_longest_unasked() -> None:
    rules = [Rules.parse(200, b"User-agent: *\nDisallow: /x\n" * n, "mmdata") for n in (100, 101, 102, 5000)]
    cache = RobotsCache(max_bytes=3 * rules[2].size)
    for name, each in zip("abc", rules, strict=False):
        cache.put(name, each)
    cache.put("a", rules[0])  # again: counted once
    assert [cache.get(n) is not None for n in "bca"] == [True] * 3
    cache.put("d", rules[0])
    assert [n for n in "abcd" if cache.get(n) is not None] == ["a", "c", "d"]
    cache.put("big", rules[3])  # larger than all: it alone is kept, for those who wait for it
    assert [n for n in ("a", "c", "d", "big") if cache.get(n) is not None] == ["big"]
