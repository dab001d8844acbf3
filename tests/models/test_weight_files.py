"""Weights by path or URL: nothing is used that has not the checksum, and nothing is fetched twice."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import BadServer

from mmdata.errors import MissingExtra, RecipeError
from mmdata.models.weight_files import bring_file, cache_folder, file_weights

DATA = bytes(range(256)) * 5000
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server() -> Iterator[BadServer]:
    with BadServer({"/head.pth": ("application/octet-stream", DATA), "/other.pth": ("text/html", b"moved")}) as found:
        yield found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMDATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def test_is_fetched_once_and_whole(server: BadServer, cache: Path, capsys: pytest.CaptureFixture[str]):
    url = server.url("/head.pth")
    first = bring_file("step", url, SHA)
    assert first == cache / f"{SHA}-head.pth"
    assert first.read_bytes() == DATA
    assert f"fetching the weights {url} (1.3 MB)" in capsys.readouterr().err
    assert bring_file("step", url, SHA) == first
    assert server.hits["/head.pth"] == 1
    assert capsys.readouterr().err == ""
    assert [p.name for p in cache.iterdir() if p.suffix != ".lock"] == [first.name]


def test_workers_that_start_together_fetch_once(server: BadServer):
    found: list[Path] = []
    bring = lambda: found.append(bring_file("step", server.url("/head.pth"), SHA))  # noqa: E731
    threads = [threading.Thread(target=bring) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert server.hits["/head.pth"] == 1


def test_a_damaged_copy_is_fetched_anew(server: BadServer):
    path = bring_file("step", server.url("/head.pth"), SHA)
    path.write_bytes(DATA[:-1])
    assert bring_file("step", server.url("/head.pth"), SHA).read_bytes() == DATA


def test_another_content_is_refused_and_not_kept(server: BadServer, cache: Path, tmp_path: Path):
    url = server.url("/other.pth")
    got = hashlib.sha256(b"moved").hexdigest()
    with pytest.raises(RecipeError, match=f"step: the weights {url} have the sha256 {got}, and not {SHA}"):
        bring_file("step", url, SHA)
    assert [p for p in cache.iterdir() if p.suffix != ".lock"] == []
    local = tmp_path / "local.pth"
    local.write_bytes(b"moved")
    with pytest.raises(RecipeError, match=f"have the sha256 {got}, and not {SHA}"):
        bring_file("step", str(local), SHA)
    assert bring_file("step", str(local), got) == local
    assert bring_file("step", str(local), None) == local


@pytest.mark.parametrize("page", ["/status/404", "/status/503", "/reset"])
def test_what_cannot_be_fetched_is_one_sentence(server: BadServer, cache: Path, page: str):
    with pytest.raises(MissingExtra, match=r"cannot be fetched \(.+\); fetch the file where there is a network"):
        bring_file("step", server.url(page), SHA)
    assert [p for p in cache.iterdir() if p.suffix != ".lock"] == []


def test_nobody_listens(cache: Path):
    with pytest.raises(MissingExtra, match=r"http://127\.0\.0\.1:1/head\.pth are not in .*refused"):
        bring_file("step", "http://127.0.0.1:1/head.pth", SHA)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMDATA_CACHE", str(tmp_path / "file"))
    with pytest.raises(MissingExtra, match=r"cannot keep the weights .* set MMDATA_CACHE to another folder"):
        bring_file("step", "http://127.0.0.1:1/head.pth", SHA)


def test_what_a_plan_says_and_refuses(tmp_path: Path):
    assert file_weights("step", "head", "https://example.org/a.pth", SHA).fingerprint == f"sha256:{SHA}"
    with pytest.raises(RecipeError, match=r"weights https://example\.org/a\.pth need `sha256`.* sha256sum FILE"):
        file_weights("step", "head", "https://example.org/a.pth", None)
    with pytest.raises(RecipeError, match="'abc' is no checksum; expected 64"):
        file_weights("step", "head", "https://example.org/a.pth", "abc")
    with pytest.raises(RecipeError, match="a local path or an http"):
        file_weights("step", "head", "ftp://example.org/a.pth", SHA)
    with pytest.raises(RecipeError, match="there is no weights file nowhere"):
        file_weights("step", "head", "nowhere", None)
    (tmp_path / "a.pth").write_bytes(DATA)
    local = file_weights("step", "head", str(tmp_path / "a.pth"), None)
    assert (local.path, local.fingerprint, local.size_bytes) == (str(tmp_path / "a.pth"), None, len(DATA))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch):
    assert cache_folder().name == "weights"
    monkeypatch.delenv("MMDATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/mmdata/weights")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/a")
    assert cache_folder() == Path("/a/.cache/mmdata/weights")
