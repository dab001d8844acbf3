"""The demo's web server: pictures, and what the web does to them, on a loopback port of this process.

In: a list of `Row`s, each with what it is. Out: their URLs while the server lives. It stops with its context manager,
slow answers included.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

__all__ = ["Row", "Server", "rows"]

SLOW_S = 60.0  # longer than any deadline a recipe would give such a small picture


@dataclass(frozen=True)
class Row:
    """One row of the demo's list. `truth` says what it is; `body` None = never answered in time."""

    path: str
    caption: str
    truth: str
    body: bytes | None
    status: int = 200
    content_type: str = "image/jpeg"


def rows() -> list[Row]:
    """The demo's rows, 50 of them; what is good comes first, so that a copy never stands before its original."""
    pictures = files("mmdata") / "demo" / "pictures"
    listed = list(csv.DictReader(io.StringIO((pictures / "captions.csv").read_text(encoding="utf-8"))))
    body = {line["file"]: (pictures / line["file"]).read_bytes() for line in listed}
    caption = {line["file"]: line["caption"] for line in listed}
    found = [
        Row(f"pictures/{name}", line["wrong_caption"] or line["caption"], _truth(line), body[name])
        for line in listed
        for name in [line["file"]]
    ]
    found += [Row(f"mirror/{n}", caption[n], "duplicate", body[n]) for n in ("penguin.jpg", "coffee.jpg", "drum.jpg")]
    found += _near_duplicates(body, caption)
    found += [
        Row("gone/kite.jpg", "a kite above the beach", "missing", b"not here", 404, "text/plain"),
        Row("gone/anchor.jpg", "an old iron anchor", "missing", b"not here", 404, "text/plain"),
        Row("gone/violin.jpg", "a violin and its bow", "missing", b"gone for good", 410, "text/plain"),
        Row("error/windmill.jpg", "a windmill in a field", "missing", b"try again later", 503, "text/plain"),
        Row("broken/tiger.jpg", caption["tiger.jpg"], "broken", body["tiger.jpg"][:4000]),
        Row("broken/bus.jpg", caption["bus.jpg"], "broken", body["bus.jpg"][:200]),
        Row("broken/hotlink.jpg", "a photograph of a lake", "broken", b"<!doctype html><p>No hot links, please."),
        Row("broken/empty.jpg", "a photograph of a wood", "broken", b""),
        Row("slow/snail.jpg", "a snail on a leaf", "slow", None),
        Row("slow/tortoise.jpg", "a tortoise that walks", "slow", None),
        Row("thumbs/baseball.jpg", caption["baseball.jpg"], "too_small", _changed(body["baseball.jpg"], scale=0.2)),
        Row("pictures/IMG_0042.jpg", "IMG_0042.jpg", "poor_caption", body["trombone.jpg"]),
    ]
    return found


def _truth(line: dict[str, str]) -> str:
    return "mis_captioned" if line["wrong_caption"] else "good"


def _near_duplicates(body: dict[str, bytes], caption: dict[str, str]) -> list[Row]:
    changes: list[tuple[str, dict[str, Any]]] = [
        ("strawberry.jpg", {"scale": 0.7}),
        ("football.jpg", {"quality": 40}),
        ("cat.jpg", {"brightness": 1.15}),
        ("daisy.jpg", {"form": "PNG"}),
        ("ladybird.jpg", {"form": "WEBP", "scale": 0.8}),
    ]
    return [
        Row(
            f"again/{name.removesuffix('.jpg')}.{change.get('form', 'jpg').lower()}",
            caption[name],
            "near_duplicate",
            _changed(body[name], **change),
            content_type=f"image/{change.get('form', 'jpeg').lower()}",
        )
        for name, change in changes
    ]


def _changed(data: bytes, scale: float = 1.0, quality: int = 80, brightness: float = 1.0, form: str = "JPEG") -> bytes:
    """The picture scaled, brightened and encoded anew."""
    from PIL import Image, ImageEnhance

    with Image.open(io.BytesIO(data)) as picture:
        size = (round(picture.width * scale), round(picture.height * scale))
        changed = ImageEnhance.Brightness(picture.convert("RGB").resize(size)).enhance(brightness)
    written = io.BytesIO()
    changed.save(written, form, quality=quality)
    return written.getvalue()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a client that never hangs up does not hold the demo's end
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that left early, as a fetcher leaves slow rows, is part of the demo."""


@dataclass(frozen=True)
class Server:
    """A running server: `url(row)` is where it hands out a row."""

    port: int

    def url(self, row: Row) -> str:
        """The row's URL on this machine."""
        return f"http://127.0.0.1:{self.port}/{row.path}"

    @classmethod
    @contextmanager
    def serving(cls, listed: list[Row]) -> Iterator[Server]:
        """Serve the rows until the block ends."""
        by_path = {f"/{row.path}": row for row in listed}
        over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                row = by_path.get(self.path) or Row(self.path, "", "missing", b"", 404)
                if row.body is None:
                    over.wait(SLOW_S)
                    return
                self.send_response(row.status)
                self.send_header("Content-Type", row.content_type)
                self.send_header("Content-Length", str(len(row.body)))
                self.end_headers()
                self.wfile.write(row.body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing: the run's own progress is what is to be read."""

        with _Server(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, name="demo-server", daemon=True)
            thread.start()
            try:
                yield cls(server.server_address[1])
            finally:
                over.set()
                server.shutdown()
                thread.join()
