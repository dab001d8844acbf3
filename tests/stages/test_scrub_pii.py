"""Personal data in captions, against texts whose personal data was put in by hand.

Numbers are those that authorities reserve for examples: cards of payment companies' test pages, IBANs of the ECBS'
examples, telephone numbers set aside for drama, addresses of RFC 5737 and RFC 3849.
"""

from __future__ import annotations

import io
import socket
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import make_batch, noise, png

import mmdata
from mmdata.errors import RecipeError
from mmdata.models.personal_data import PersonalData
from mmdata.stages.scrub_pii import ScrubPii, ScrubPiiOptions

EVERYTHING = ("credit_card", "email", "iban", "ip", "person", "phone", "url")


@pytest.fixture(scope="module")
def stage() -> ScrubPii:
    opened = ScrubPii(ScrubPiiOptions())
    opened.open("cpu")
    return opened


@pytest.fixture(scope="module")
def thorough() -> ScrubPii:
    opened = ScrubPii(ScrubPiiOptions(kinds=EVERYTHING, phone_regions=("GB", "DE", "US")))
    opened.open("cpu")
    return opened


def scrub(stage: ScrubPii, *texts: str | None) -> list[dict[str, Any]]:
    columns = stage.compute(make_batch(caption=pa.array(texts, pa.string())))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("mail joe.smith+x@example.co.uk, please", "mail <EMAIL>, please"),
        ("not a@b or me@home or @user", "not a@b or me@home or @user"),
        ("邮箱joe@example.com谢谢", "邮箱<EMAIL>谢谢"),  # no space between the letters of two scripts
        ("müller@münchen.de", "<EMAIL>"),
        ("paid with 4111 1111 1111 1111 today", "paid with <CREDIT_CARD> today"),
        ("paid with 4111-1111-1111-1112 today", "paid with 4111-1111-1111-1112 today"),  # wrong check digit
        ("13 digits: 4222222222222", "13 digits: <CREDIT_CARD>"),
        ("2223 0031 2200 3222 begins with 2", None),  # a right check digit, but none of presidio's beginnings
        ("amex 3782 822463 10005", "amex <CREDIT_CARD>"),
        ("卡号4111111111111111。", "卡号<CREDIT_CARD>。"),
        ("IBAN DE89 3704 0044 0532 0130 00 thanks", "IBAN <IBAN> thanks"),
        ("IBAN DE89 3704 0044 0532 0130 01 thanks", "IBAN DE89 3704 0044 0532 0130 01 thanks"),  # wrong check digits
        ("GB82WEST12345698765432", "<IBAN>"),
        ("at 192.0.2.1, or 2001:db8::1.", "at <IP>, or <IP>."),
        ("2001:0db8:85a3:0000:0000:8a2e:0370:7334", "<IP>"),
        ("::ffff:192.0.2.128 and ::1", "<IP> and <IP>"),
        ("256.1.1.1, version 1.2.3.4.5, std::vector, a::b, 12:30:45", None),
        ("call +44 20 7946 0958 now", "call <PHONE> now"),
        ("call (650) 253-0000 now", "call <PHONE> now"),
        ("电话+86 10 6552 9988号", "电话<PHONE>号"),
        ("wallpapers 1920x1080, 12 June 2015, 50% off, $19.99", None),
        ("see www.example.org by Angela Merkel", None),  # neither is asked for
        ("تصوير", None),
    ],
)
def test_what_is_replaced(stage: ScrubPii, text: str, scrubbed: str | None):
    (row,) = scrub(stage, text)
    assert row["scrubbed_text"] == (text if scrubbed is None else scrubbed)
    for kind in stage.options.kinds:
        assert row[f"scrubbed_{kind}_count"] == (scrubbed or "").count(f"<{kind.upper()}>")


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("see https://me:secret@example.org/a?b=c. and www.example.org!", "see <URL>. and <URL>!"),
        ("IMG_1234.jpg, photo.of a cat", "IMG_1234.jpg, photo.of a cat"),
        ("Photo by Angela Merkel in Berlin", "Photo by <PERSON> in Berlin"),
        ("http://192.0.2.1/x mailto:joe@example.com", "<URL> mailto:<EMAIL>"),  # the address is part of a longer find
        ("call 030 901820", "call <PHONE>"),  # as in Berlin
        ("DE89370400440532013000", "<IBAN>"),  # not the card or the telephone number inside it
    ],
)
def test_kinds_that_are_asked_for(thorough: ScrubPii, text: str, scrubbed: str):
    (row,) = scrub(thorough, text)
    assert row["scrubbed_text"] == scrubbed
    assert sum(v for name, v in row.items() if name.endswith("_count")) == scrubbed.count("<")


def test_a_missing_caption_is_null_and_an_empty_one_empty(stage: ScrubPii):
    missing, empty = scrub(stage, None, "")
    assert set(missing.values()) == {None}
    assert empty["scrubbed_text"] == ""
    assert {v for name, v in empty.items() if name.endswith("_count")} == {0}


def test_what_nobody_looked_at_is_not_passed_on(stage: ScrubPii):
    end = "x" * 9_990 + " joe@example.com " + "y" * 100_000
    at_the_cut, behind = scrub(stage, end, "x" * 10_500 + " joe@example.com")
    assert at_the_cut["scrubbed_text"] == "x" * 9_990 + " <EMAIL>"
    assert at_the_cut["scrubbed_email_count"] == 1
    assert (behind["scrubbed_text"], behind["scrubbed_email_count"]) == ("x" * 10_000, 0)


def test_nothing_is_asked_of_the_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    finder = PersonalData(("email", "url"), ("US",))
    assert finder.spans(["a@example.com www.example.org"]) == [[(0, 13, "email"), (14, 29, "url")]]


@pytest.mark.parametrize("region", ["UK", "us", "XX"])
def test_a_region_without_telephones_is_refused(region: str):
    with pytest.raises(RecipeError, match=f"no phone region '{region}'"):
        ScrubPii.contract(ScrubPiiOptions(phone_regions=("US", region)))


def test_kinds_in_another_order_are_the_same_question():
    assert ScrubPiiOptions(kinds=("ip", "email")) == ScrubPiiOptions(kinds=("email", "ip", "ip"))
    contract = ScrubPii.contract(ScrubPiiOptions(kinds=("ip", "email")))
    assert contract.writes.names == ["scrubbed_text", "scrubbed_email_count", "scrubbed_ip_count"]


def test_a_find_is_stored_nowhere_but_in_the_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Through a whole run: the address stands in the base rows, in no column file, log or ledger."""
    monkeypatch.chdir(tmp_path)
    secret = "joe.doe@example.com"
    with tarfile.open("00000.tar", "w") as tar:
        for name, data in {"0.png": png(noise(32, 32, 0)), "0.txt": f"mail {secret} now".encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = {"kind": "webdataset", "path": "00000.tar"}
    ds = mmdata.run({"name": "pii", "dataset": "pii", "source": source, "steps": ["scrub_pii"]}, runner="inline")
    assert ds.sql("SELECT scrubbed_text, scrubbed_email_count FROM samples").fetchall() == [("mail <EMAIL> now", 1)]

    def holds(path: Path) -> bool:
        if path.suffix == ".parquet":
            return secret in str(pq.read_table(path).to_pylist())
        return secret.encode() in path.read_bytes()

    assert {p.parent.name for p in Path("pii").rglob("*") if p.is_file() and holds(p)} == {"rows"}
