"""Names to checked addresses: once each, and no dead server holds the others up."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest

from mmdata.media import resolver
from mmdata.media.addresses import AddressRefused
from mmdata.media.resolver import Resolver


def resolve(
    monkeypatch: pytest.MonkeyPatch, answers: Any, allow_private: bool = False, times: int = 1, looked_up: int = 1
) -> list[str]:
    def look_up(host: str, port: Any, **options: Any) -> Any:
        calls.append(host)
        if isinstance(answers, Exception):
            raise answers
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in answers]

    async def ask() -> list[str]:
        names = Resolver(allow_private)
        try:
            asked = await asyncio.gather(*(names.addresses("x.test") for _ in range(times)))
        finally:
            await names.close()
        return asked[0]

    calls: list[str] = []
    monkeypatch.setattr(resolver, "_cache", {})
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    found = asyncio.run(ask())
    assert len(calls) == looked_up
    return found


def test_checked_addresses_only_are_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(monkeypatch, ["10.0.0.1", "8.8.8.8", "8.8.8.8", "::1"]) == ["8.8.8.8"]
    assert resolve(monkeypatch, ["10.0.0.1"], allow_private=True) == ["10.0.0.1"]
    with pytest.raises(AddressRefused, match=r"10\.0\.0\.1 \(private\)"):
        resolve(monkeypatch, ["10.0.0.1"])


def test_names_are_looked_up_once_and_temporary_failures_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(monkeypatch, ["8.8.8.8"], times=20) == ["8.8.8.8"]
    with pytest.raises(socket.gaierror):
        resolve(monkeypatch, socket.gaierror(socket.EAI_AGAIN, "later"))
    assert resolver._cache == {}
    with pytest.raises(socket.gaierror):
        resolve(monkeypatch, socket.gaierror(socket.EAI_NONAME, "unknown"))
    assert list(resolver._cache) == ["x.test"]


def addresses_of(fixed: Mapping[str, str], *hosts: str, allow_private: bool = False) -> list[str]:
    async def ask() -> list[str]:
        names = Resolver(allow_private, fixed)
        found = []
        for host in hosts:
            try:
                found += await names.addresses(host)
            except (AddressRefused, socket.gaierror) as error:
                found.append(type(error).__name__)
        await names.close()
        return found

    return asyncio.run(ask())


def test_given_addresses_stand_for_names(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = socket.gaierror(socket.EAI_NONAME, "unknown")
    monkeypatch.setattr(resolver, "_cache", {})
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(unknown))
    fixed = {"a.test": "8.8.8.1", "*.a.test": "8.8.8.2", "*.B.test.": "8.8.8.3", "*.x.b.test": "2606:4700::1"}
    hosts = ["a.test", "a.test.", "w.a.test", "v.w.a.test", "c.b.test", "c.x.b.test", "b.test", "ab.test"]
    found = ["8.8.8.1", "8.8.8.1", "8.8.8.2", "8.8.8.2", "8.8.8.3", "2606:4700::1", "gaierror", "gaierror"]
    assert addresses_of(fixed, *hosts) == found


def test_given_addresses_are_checked_as_all_are() -> None:
    fixed = {"*.test": "127.0.0.1", "*.inside.test": "::ffff:10.0.0.1"}
    assert addresses_of(fixed, "a.test", "a.inside.test") == ["AddressRefused", "AddressRefused"]
    assert addresses_of(fixed, "a.test", allow_private=True) == ["127.0.0.1"]


def test_addresses_need_no_look_up_and_cannot_be_given_others() -> None:
    fixed = {"8.8.8.8": "9.9.9.9"}
    assert addresses_of(fixed, "8.8.8.8", "::1", "2606:4700::1") == ["8.8.8.8", "AddressRefused", "2606:4700::1"]


def test_names_of_dead_servers_stand_before_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_cache", {})
    monkeypatch.setattr(resolver, "_QUICK_S", 0.1)
    monkeypatch.setattr(resolver, "_AT_ONCE", 4)

    def look_up(host: str, *_: Any, **__: Any) -> Any:
        if host.startswith("dead"):
            time.sleep(1.5)
            raise socket.gaierror(socket.EAI_AGAIN, "later")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 0))]

    async def ask() -> float:
        names = Resolver()
        dead = [asyncio.create_task(names.addresses(f"dead{n}.test")) for n in range(12)]
        await asyncio.sleep(0)
        started = time.monotonic()
        assert await names.addresses("quick.test") == ["8.8.8.8"]
        elapsed = time.monotonic() - started
        assert {type(e) for e in await asyncio.gather(*dead, return_exceptions=True)} == {socket.gaierror}
        await names.close()
        return elapsed

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert asyncio.run(ask()) < 1.4  # three lanes of four, 0.1 s each; 4.5 s if each held its place


def test_a_look_up_that_hangs_keeps_no_process_alive() -> None:
    code = """
import asyncio, socket, time
from mmdata.media.resolver import Resolver
socket.getaddrinfo = lambda *a, **k: time.sleep(600)
async def main():
    names = Resolver()
    try:
        await asyncio.wait_for(names.addresses("x.test"), 0.1)
    except TimeoutError:
        print("late")
    await names.close()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "late\n"
