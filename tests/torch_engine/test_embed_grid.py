"""`simmim embed --grid`: a vector of every window of an image, which `simmim search` finds again."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import simmim
from simmim.cli import main
from simmim.errors import UserError
from simmim.torch_engine.tasks import embed as module

from . import tiny

USUAL: dict[str, Any] = {"device": "cpu", "precision": "fp32", "workers": 1}
SCENE = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
CORNERS = [(row, column) for row in (0, 64) for column in (0, 64, 128)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of 2 x 3 windows, and a run whose images have the size of one."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "scenes").mkdir()
    for name, scene in (("a", SCENE), ("b", SCENE[::-1])):
        Image.fromarray(scene).save(folder / "scenes" / f"{name}.png")
    few = {"steps": 1, "batch_size": 2, "val_images": 0}
    simmim.pretrain(**vars(tiny.config("vit", data=str(folder / "scenes"), out=str(folder / "run"), **few)))
    return folder


def test_each_window_has_timms_features_of_its_pixels(here: Path) -> None:
    names, features = simmim.embed(here / "run", here / "scenes", grid=True, **USUAL)
    assert [Path(name).name for name in names] == [f"{scene}.png@{row},{column}" for scene in "ab"
                                                   for row, column in CORNERS]  # fmt: skip
    backbone: Any = timm.create_model(f"local-dir:{here}/run/encoder", pretrained=True, num_classes=0).eval()
    mean, std = (torch.tensor(backbone.pretrained_cfg[name]) for name in ("mean", "std"))
    windows = np.stack([SCENE[row : row + 64, column : column + 64] for row, column in CORNERS])
    with torch.no_grad():
        tokens = backbone.forward_features(((torch.from_numpy(windows) / 255 - mean) / std).permute(0, 3, 1, 2))
    expected = tokens[:, backbone.num_prefix_tokens :].mean(dim=1).numpy()
    np.testing.assert_allclose(features[:6], expected, atol=1e-5)


def test_search_finds_windows_and_pictures_them(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, scenes, file = str(here / "run"), str(here / "scenes"), str(tmp_path / "windows.npz")
    assert main(["embed", run, "--data", scenes, "--grid", "--out", file, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("12 windows, features (12, 48) float32, are in ")
    query = tmp_path / "query.png"
    Image.fromarray(SCENE[64:, 64:128]).save(query)
    words = ["--features", file, "--query", str(query), "--count", "3", "--device", "cpu"]
    picture = tmp_path / "near.png"
    assert main(["search", run, "--data", scenes, *words, "--out", str(picture), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert [Path(near["name"]).name[:6] in ("a.png@", "b.png@") for near in found["neighbours"]] == [True] * 3
    assert Path(found["neighbours"][0]["name"]).name == "a.png@64,64"
    assert found["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    with Image.open(picture) as image:
        assert image.width > 3 * 64


def test_what_does_not_go_with_a_grid_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--grid makes many vectors of an image, and --labels one label"):
        simmim.embed(here / "run", here / "scenes", grid=True, labels=True, **USUAL)
    (here / "sounds").mkdir()
    (here / "sounds" / "a.wav").write_bytes(b"")
    with pytest.raises(UserError, match="run was trained on images, and these are sounds; give images"):
        simmim.embed(here / "run", here / "sounds", grid=True, **USUAL)
    bands = np.random.default_rng(0).integers(0, 256, (64, 64, 7), dtype=np.uint8)
    np.save(here / "bands.npy", bands)
    with pytest.raises(UserError, match="images have 7 channels, not 3: give images of 3, or another encoder"):
        simmim.embed(here / "run", here / "bands.npy", grid=True, **USUAL)
    monkeypatch.setattr(module, "load_encoder", lambda _: SimpleNamespace(front_end=None))
    with pytest.raises(UserError, match=r"--grid is for images, and .*run was trained on sounds; leave it out"):
        simmim.embed(here / "run", here / "scenes", grid=True, **USUAL)
