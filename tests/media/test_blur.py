"""Boxes blurred: against scikit-image's Gaussian by hand-made masks, and what an export does with them."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import kept_rows
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage.filters import gaussian

from mmdata.errors import RecipeError, StoreError
from mmdata.export import ExportOptions, export
from mmdata.media.blur import blur_boxes, blur_image, boxes_of
from mmdata.media.image import decode


def picture(height: int = 120, width: int = 160) -> Any:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)


def test_against_scikit_image() -> None:
    """A box of 40 by 30 has a diagonal of 50: 5 px of padding, and a sigma of 5."""
    source = picture()
    found = blur_boxes(source, [(60, 40, 100, 70)])
    mask = np.zeros((120, 160))
    mask[35:75, 55:105] = 1
    soft = gaussian(mask, 5, mode="nearest", truncate=4)
    soft[40:70, 60:100] = 1
    smooth = gaussian(source.astype(float), 5, mode="nearest", truncate=4, channel_axis=2)
    expected = source * (1 - soft[:, :, None]) + smooth * soft[:, :, None]
    assert np.abs(found - expected).max() < 1
    assert np.array_equal(found[:10], source[:10])
    assert found[40:70, 60:100].std() < source.std() / 10


def test_the_largest_box_decides_the_sigma_of_all() -> None:
    source = picture()
    small, large = (10, 10, 14, 13), (60, 40, 100, 70)
    both = blur_boxes(source, [small, large])
    alone = blur_boxes(source, [small])
    assert both[10:13, 10:14].std() < alone[10:13, 10:14].std()


def test_what_lies_outside_is_cut_off_and_nothing_to_do_is_nothing_done() -> None:
    source = picture()
    assert np.array_equal(blur_boxes(source, [(-50, -50, -10, -10)]), source)
    assert np.array_equal(blur_boxes(source, [(500, 500, 600, 700)]), source)
    edge = blur_boxes(source, [(-20, -20, 20.5, 10.2)])
    assert edge.shape == source.shape
    assert not np.array_equal(edge[:11, :21], source[:11, :21])
    whole = blur_boxes(source, [(0, 0, 160, 120)])
    assert whole.std() < source.std() / 10


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_keeps_its_format(form: str) -> None:
    sink = io.BytesIO()
    Image.fromarray(picture()).save(sink, form)
    data = blur_image(sink.getvalue(), [(60, 40, 100, 70)])
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == (form, (160, 120))
    assert decode(data)[45:65, 65:95].std() < 30
    assert blur_image(sink.getvalue(), []) is not None
    assert blur_image(sink.getvalue(), []) == sink.getvalue()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ([], []),
        ([[1, 2, 3, 4]], [(1.0, 2.0, 3.0, 4.0)]),
        ([{"right": 3.5, "left": 1, "bottom": 4, "top": 2, "score": 0.9}], [(1.0, 2.0, 3.5, 4.0)]),
    ],
)
def test_boxes(value: Any, expected: Any) -> None:
    assert boxes_of(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        [[1, 2, 3]],
        [[1, 2, 3, None]],
        [[1, 2, math.nan, 4]],
        [[3, 2, 1, 4]],
        [{"left": 1, "top": 2, "right": 3}],
        [None],
    ],
)
def test_what_is_no_box(value: Any) -> None:
    with pytest.raises(ValueError, match="is no box"):
        boxes_of(value)


STRUCT = pa.list_(pa.struct([(n, pa.float32()) for n in ("left", "top", "right", "bottom", "score")]))


def with_faces(rows: kept_rows.KeptRows, kind: pa.DataType, boxes: Any) -> kept_rows.KeptRows:
    for shard, table in enumerate(rows.tables):
        numbers = [int(k) for k in table.column("key").to_pylist()]
        rows.tables[shard] = table.append_column("faces", pa.array([boxes(n) for n in numbers], kind))
    return rows


@pytest.mark.parametrize("kind", [STRUCT, pa.list_(pa.list_(pa.int64(), 4))])
def test_an_export_blurs_pictures_with_boxes_and_leaves_the_others(tmp_path: Path, kind: pa.DataType) -> None:
    """Every fourth row has one box: 8 of the 32 kept rows, whose numbers are not multiples of three."""

    def boxes(number: int) -> list[Any]:
        box = {"left": 10, "top": 10, "right": 30, "bottom": 30, "score": 1.0}
        return [] if number % 4 else [box if kind == STRUCT else [10, 10, 30, 30]]

    rows = with_faces(kept_rows.dataset(tmp_path / "dataset"), kind, boxes)
    options = ExportOptions(path=str(tmp_path / "out"), format="parquet", blur="faces", columns=("license",))
    out = export(rows, options, None).path
    table = pq.read_table(out / "00000.parquet")
    changed = 0
    for key, image in zip(table.column("key").to_pylist(), table.column("image").to_pylist(), strict=True):
        stored = rows.pictures[key]
        if int(key) % 4:
            assert image["bytes"] == stored
            continue
        changed += 1
        before, after = decode(stored).astype(int), decode(image["bytes"]).astype(int)
        assert after.shape == before.shape
        assert np.array_equal(after, decode(blur_image(stored, [(10, 10, 30, 30)])))
        assert np.abs(after - before)[:, 40:].max() < np.abs(after - before)[10:30, 10:30].max()
    assert changed == 8
    assert "Boxes are blurred in 8 pictures" in (out / "README.md").read_text()
    assert "faces" not in table.column_names
    assert export(rows, options, None).written is False
    moved = with_faces(kept_rows.dataset(tmp_path / "dataset"), kind, lambda n: [])
    assert export(moved, options, None).written is True  # the boxes decide what is exported, so they are hashed


def test_a_picture_nobody_can_vouch_for_is_not_exported(tmp_path: Path) -> None:
    rows = with_faces(kept_rows.dataset(tmp_path / "dataset"), STRUCT, lambda n: None if n == 5 else [])
    options = ExportOptions(path=str(tmp_path / "out"), blur="faces")
    with pytest.raises(StoreError, match=r"1 kept rows of shard 00000 have NULL in 'faces'.*faces IS NOT NULL"):
        export(rows, options, None)
    box = [{"left": 1, "top": 1, "right": 9, "bottom": 9, "score": 1}]
    rows = with_faces(kept_rows.dataset(tmp_path / "dataset"), STRUCT, lambda n: box if n == 5 else [])
    inner = rows.read_media
    broken = {"5": b"\xff\xd8\xff" + bytes(len(rows.pictures["0000005"]) - 3)}
    rows.read_media = lambda path, offset, size: (  # type: ignore[method-assign]
        broken["5"] if inner(path, offset, size) == rows.pictures["0000005"] else inner(path, offset, size)
    )
    with pytest.raises(StoreError, match="sample 0000005 cannot be blurred"):
        export(rows, options, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "told"), [("face", "no column 'face'"), ("labels", "expected a list of boxes")])
def test_a_column_that_holds_no_boxes_is_told(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        export(kept_rows.dataset(tmp_path / "dataset"), ExportOptions(path=str(tmp_path / "out"), blur=name), None)
