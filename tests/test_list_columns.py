"""What a list says of its rows' bodies: their hashes (`fetch.verify_hash`) and boxes to be blurred (`fetch.bbox`)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from server import JPEG, BadServer

import mmdata


def checks() -> bytes:
    """A PNG of one-pixel checks, 64 x 64: blurred it is grey."""
    sink = io.BytesIO()
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(np.stack([board] * 3, axis=2)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with BadServer({f"/checks.png?{i}": ("image/png", checks()) for i in range(4)}) as running:
        yield running


def run(tmp_path: Path, path: Path, **fetch: Any) -> Any:
    usual = {"allow_private": True, "robots": "ignore", "per_host": 9, "per_host_rate": None}
    source = {"kind": "urls", "path": str(path)}
    return mmdata.run(
        {"name": "x", "dataset": str(tmp_path / "ds"), "source": source, "fetch": usual | fetch}, runner="inline"
    )


def as_csv(path: Path, columns: dict[str, list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.mark.parametrize("kind", ["sha256", "md5", "sha512"])
def test_a_body_with_another_hash_than_the_list_gives_is_not_stored(
    server: BadServer, tmp_path: Path, kind: str
) -> None:
    right = hashlib.new(kind, JPEG).hexdigest()
    columns = {"url": [server.url(f"/ok/{i}") for i in range(4)], "hash": [right, right.upper(), "00" + right[2:], ""]}
    ds = run(tmp_path, as_csv(tmp_path / "list.csv", columns), verify_hash=["hash", kind])
    found = ds.sql("SELECT status, image_path IS NULL, sha256 FROM rows ORDER BY row_id").fetchall()
    assert [f[0] for f in found][:3] == ["ok", "ok", "hash_mismatch"]
    assert found[2] == ("hash_mismatch", True, hashlib.sha256(JPEG).hexdigest())
    assert "hash" not in ds.sql("SELECT * FROM rows").columns


def stored(ds: Any) -> list[np.ndarray | None]:
    rows = ds.sql("SELECT image_path, image_offset, image_size FROM rows ORDER BY row_id").fetchall()
    return [None if r[0] is None else np.asarray(Image.open(io.BytesIO(ds.read_media(*r)))).astype(int) for r in rows]


LEFT_HALF = [[0.0, 0.0, 0.5, 1.0]]


def spread(picture: np.ndarray) -> tuple[float, float]:
    """Standard deviation of the left and of the right quarter: 127.5 for checks, 0 for grey."""
    return float(picture[:, :16].std()), float(picture[:, 48:].std())


@pytest.mark.parametrize("form", ["parquet", "structs", "csv", "jsonl"])
def test_boxes_are_blurred_and_broken_ones_cost_their_row(server: BadServer, tmp_path: Path, form: str) -> None:
    urls = [server.url(f"/checks.png?{i}") for i in range(3)]
    boxes: list[Any] = [LEFT_HALF, [], None]
    path = tmp_path / f"list.{ {'structs': 'parquet'}.get(form, form) }"
    if form == "parquet":
        pq.write_table(pa.table({"url": urls, "faces": boxes}), path)
    elif form == "structs":
        named = [b and [dict(zip(("left", "top", "right", "bottom"), box, strict=True)) for box in b] for b in boxes]
        pq.write_table(pa.table({"url": urls, "faces": named}), path)
    else:
        urls.append(server.url("/checks.png?3"))
        boxes.append([[0.1, 0.2]])
        if form == "csv":
            as_csv(path, {"url": urls, "faces": ["" if b is None else json.dumps(b) for b in boxes]})
        else:
            path.write_text(
                "".join(json.dumps({"url": u, "faces": b}) + "\n" for u, b in zip(urls, boxes, strict=True))
            )
    ds = run(tmp_path, path, bbox="faces", resize_mode="no", encode_format="png")
    pictures = stored(ds)
    assert all(p is not None for p in pictures[:3])
    left, right = spread(pictures[0])  # type: ignore[arg-type]
    assert left < 20
    assert right > 120
    for plain in pictures[1:3]:
        assert min(spread(plain)) > 120  # type: ignore[arg-type]
    if len(pictures) > 3:
        assert pictures[3] is None
        assert ds.sql("SELECT status FROM rows WHERE row_id = 3").fetchall() != [("ok",)]
