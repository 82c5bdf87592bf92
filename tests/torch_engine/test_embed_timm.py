"""`simmim embed` by timm's own models, equal to timm; what another library makes of a run's encoder; labels."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf

import simmim
from simmim.cli import main
from simmim.data.evaluation import eval_images
from simmim.data.sources import open_source
from simmim.errors import UserError
from simmim.torch_engine.tasks.feature_files import read_features

from . import tiny

USUAL: dict[str, Any] = {"device": "cpu", "precision": "fp32", "workers": 1, "batch_size": 4}
OWN = {
    "input_size": (3, 64, 64),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.3,) * 3,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of other sizes than a model's, in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(6):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        noise = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((150 + 9 * number, 101), Image.Resampling.BICUBIC)
        picture.save(folder / "ab"[number % 2] / f"{number}.{'jpg' if number < 3 else 'png'}")
    return folder


def saved(folder: Path, kind: str, **facts: Any) -> Any:
    """Save a small timm model with random weights, as timm does."""
    torch.manual_seed(0)
    sizes = {"img_size": 64} if kind in ("vit", "swinv2") else {}
    model: Any = timm.create_model(tiny.KINDS[kind].model, **tiny.KINDS[kind].arguments, **sizes, num_classes=5).eval()
    arguments = {**tiny.KINDS[kind].arguments, **sizes}
    save_for_hf(model, folder, data_config={**OWN, **facts}, model_args=arguments)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()


def timms_images(model: Any, names: list[str]) -> torch.Tensor:
    transform: Any = create_transform(**resolve_model_data_config(model))
    return torch.stack([transform(Image.open(name).convert("RGB")) for name in names])


@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet18"])
def test_features_of_a_timm_model_are_timms(photos: Path, tmp_path: Path, kind: str) -> None:
    """With the model's own pooling: a class token, a norm after the mean, a mean."""
    model = saved(tmp_path / "model", kind)
    names, features = simmim.embed(f"local-dir:{tmp_path / 'model'}", photos, **USUAL)
    with torch.no_grad():
        expected = model(timms_images(model, names))
    assert features.std(axis=0).mean() > 0.01
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "facts", [{"crop_mode": "squash", "crop_pct": 1.0}, {"crop_mode": "border"}, {"interpolation": "bilinear"}]
)
def test_every_way_of_timm_to_crop_is_kept(photos: Path, tmp_path: Path, facts: dict[str, Any]) -> None:
    model = saved(tmp_path / "model", "resnet18", **facts)
    names, features = simmim.embed(f"local-dir:{tmp_path / 'model'}", photos, **USUAL, pool="avg")
    with torch.no_grad():
        expected = model.forward_features(timms_images(model, names)).mean(dim=(2, 3))
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_a_timm_name_needs_its_weights(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, *, pretrained: bool, **_: Any) -> Any:
        assert pretrained and name == "resnet18"
        raise OSError("We couldn't connect to the hub\nand more")

    monkeypatch.setattr("simmim.torch_engine.models.encoders.timm.create_model", offline)
    with pytest.raises(UserError, match=r"^timm:resnet18 has no weights here: We couldn't connect to the hub$"):
        simmim.embed("timm:resnet18", photos, **USUAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("local-dir:nowhere", "local-dir:nowhere has no config.json; give a directory that timm or save_pretrained"),
        ("timm:no_such_model", "timm:no_such_model has no weights here: Unknown model (no_such_model)"),
        ("local-dir:model --pool own --layer 0", "pool own is that of the last layer, and layer is 0; use avg"),
        ("local-dir:model --patches --pool own", "--pool own makes one vector an image, and --patches many"),
    ],
)
def test_mistakes_are_told_in_one_line(
    photos: Path, tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "model", "resnet18")
    words = ["--data", str(photos), "--out", "a.npz", "--device", "cpu"]
    assert main(["embed", *options.split()[:1], *words, *options.split()[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embed") / "run"
    simmim.pretrain(**vars(tiny.config("vit", data=str(photos), out=str(out), steps=1, val_images=0)))
    return out


def test_a_runs_features_are_those_of_transformers(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    names, features = simmim.embed(run, tmp_path / "a.npz", **USUAL)
    model = transformers.AutoModel.from_pretrained(run / "encoder").eval()
    seen = eval_images(open_source(str(tmp_path / "a.npz")), range(3), size=(64, 64), channels=3, dtype=np.uint8)
    cfg: Any = simmim.load_encoder(run).pretrained_cfg
    mean, std = (torch.tensor(cfg[name]) for name in ("mean", "std"))
    with torch.no_grad():
        tokens = model(((torch.from_numpy(seen) / 255 - mean) / std).permute(0, 3, 1, 2)).last_hidden_state
    assert names == ["images 0", "images 1", "images 2"]
    np.testing.assert_allclose(features, tokens[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)


def labels_of(path: Path) -> tuple[list[str], list[str]]:
    """The names and labels of a file of features."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return arrays["names"].tolist(), arrays["labels"].tolist()
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        assert table.column_names == ["name", "label", "features"]
        return table["name"].to_pylist(), table["label"].to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:3] == ["name", "label", "f0"]
    return [row[0] for row in rows], [row[1] for row in rows]


@pytest.mark.parametrize("suffix", ["npz", "parquet", "csv"])
def test_labels_are_written_beside_the_features(
    run: Path, photos: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of class folders, also below train and val; an unreadable image has none."""
    data = tmp_path / "data"
    for part in ("train", "val"):
        shutil.copytree(photos, data / part)
    (data / "train" / "b" / "1.jpg").write_bytes(b"no image")
    words = ["embed", str(run), "--data", str(data), "--device", "cpu", "--max-bad-fraction", "0.5"]
    assert main([*words, "--labels", "--out", str(tmp_path / f"a.{suffix}")]) == 0
    assert "11 images, features (11, 48) float32 and labels of 2 classes, are in" in capsys.readouterr().out
    names, labels = labels_of(tmp_path / f"a.{suffix}")
    assert len(names) == 11 and labels == [Path(name).parent.name for name in names]
    if suffix != "csv":
        assert read_features(tmp_path / f"a.{suffix}")[0] == names


def labelled_sources(photos: Path, folder: Path) -> dict[str, list[str]]:
    """Write the same images as other sources: what `--data` names, and the labels."""
    files = sorted(photos.rglob("*.*g"))
    rows = [f"{file},{'even' if int(file.stem) % 2 == 0 else 'odd, number'}" for file in files]
    quoted = [",".join([row.split(",", 1)[0], f'"{row.split(",", 1)[1]}"']) for row in rows]
    (folder / "a.csv").write_text("\n".join(["path,label", *quoted]), encoding="utf-8")
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    np.savez(folder / "a.npz", x_train=images, y_train=[1, 0, 1, 1], class_names=["cat", "dog"])
    np.savez(folder / "b.npz", images=images, labels=["x", "y", "x", "z"])
    assert main(["pack", str(photos), "--out", str(folder / "packed")]) == 0
    return {
        str(folder / "a.csv"): ["even"] * 3 + ["odd, number"] * 3,
        str(folder / "a.npz"): ["dog", "cat", "dog", "dog"],
        str(folder / "b.npz"): ["x", "y", "x", "z"],
        str(folder / "packed"): ["a"] * 3 + ["b"] * 3,
    }


def test_labels_of_every_source(run: Path, photos: Path, tmp_path: Path) -> None:
    for data, expected in labelled_sources(photos, tmp_path).items():
        found: Any = simmim.embed(run, data, labels=True, **USUAL)
        names, features, labels = found
        assert labels == expected and len(names) == len(features) == len(labels)


def test_a_hugging_face_set_has_its_labels(run: Path, photos: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(file) for file in sorted(photos.rglob("*.*g"))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    whole = datasets.Dataset.from_dict({"image": files, "label": [0, 1, 0, 1, 0, 1]}, features=features)
    datasets.DatasetDict({"train": whole, "extra": whole.select([1])}).save_to_disk(tmp_path / "set")
    found: Any = simmim.embed(run, f"hf:{tmp_path / 'set'}", labels=True, **USUAL)
    assert found[2] == list("ababab")
    found = simmim.embed(run, f"hf:{tmp_path / 'set'}:extra", labels=True, **USUAL)
    assert found[2] == ["b"]


def test_data_without_labels_is_refused(run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(map(str, photos.rglob("*.png"))), encoding="utf-8")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 64, 64, 3), np.uint8))
    for data, message in [
        (photos / "a", "0.jpg of .* is in no class folder, so that it has no label"),
        (tmp_path / "list.txt", "lists paths without labels; give a .csv of path,label"),
        (tmp_path / "a.npz", r"has no array labels \(2,\) with the label of each image"),
    ]:
        with pytest.raises(UserError, match=message):
            simmim.embed(run, data, labels=True, **USUAL)
