"""`simmim embed`: the probe's features in every format, odd names, bad images, and what a killed process leaves."""

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

import simmim
from simmim.cli import main
from simmim.data.evaluation import eval_images
from simmim.data.files import PathList
from simmim.data.sources import Subset, open_source
from simmim.errors import UserError
from simmim.torch_engine.models.masked_image_model import PixelStep
from simmim.torch_engine.tasks import embed as module
from simmim.torch_engine.tasks.embed import EmbedConfig, embed_to_file
from simmim.torch_engine.tasks.features import FeatureReader, PooledFeatures
from simmim.training.run_lock import locked

from . import tiny, worker

USUAL: dict[str, Any] = {"device": "cpu", "precision": "fp32", "workers": 2, "batch_size": 4}
ODD = ["two\nlines.png", 'a "quoted", name.png', "großes Bild.png", os.fsdecode(b"not-\xff-utf8.png")]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining `run` and 13 images of its size, of which some have odd names."""
    folder = tmp_path_factory.mktemp("embed")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for name in [*(f"{number}.png" for number in range(9)), *ODD]:
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "images" / name)
    simmim.pretrain(**vars(tiny.config("vit", data=str(folder / "images"), out=str(folder / "run"), steps=1)))
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 5 images: 3 of them."""
    monkeypatch.setattr(module, "PART_IMAGES", 5)
    monkeypatch.setattr(module, "PART_IMAGES_OF_PATCHES", 5)


def write(here: Path, out: Path, **settings: Any) -> list[str]:
    config = {"run": str(here / "run"), "data": str(here / "images"), "out": str(out), **USUAL, **settings}
    return embed_to_file(EmbedConfig(**config))


def embed(here: Path, **settings: Any) -> tuple[list[str], NDArray[Any]]:
    return simmim.embed(here / "run", here / "images", **USUAL, **settings)


def cells(here: Path, names: list[str], *, by_transformers: bool = False) -> torch.Tensor:
    """timm's own feature map (N, h·w, D) of the images' middles, or Transformers'."""
    backbone: Any = timm.create_model(f"local-dir:{here}/run/encoder", pretrained=True, num_classes=0).eval()
    mean, std = (torch.tensor(backbone.pretrained_cfg[name]) for name in ("mean", "std"))
    pixels = eval_images(PathList(names), range(len(names)), size=(64, 64), channels=3, dtype=np.uint8)
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        if by_transformers:
            model = pytest.importorskip("transformers").AutoModel.from_pretrained(here / "run" / "encoder").eval()
            tokens = model(pixel_values=images).last_hidden_state
        else:
            tokens = backbone.forward_features(images)
    return tokens[:, backbone.num_prefix_tokens :]


def test_features_are_those_of_the_probe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Subset(open_source("demo"), np.arange(20))
    backbone: Any = simmim.load_encoder(here / "run")
    read = FeatureReader(
        model=PooledFeatures(backbone),
        pixels=PixelStep(backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"]),
        size=(64, 64),
        channels=3,
        dtype=np.dtype(np.uint8),
        precision="fp32",
        batch_size=5,
        workers=2,
        max_bad_fraction=0,
    )
    monkeypatch.setattr(module, "PART_IMAGES", 500)
    names, features = simmim.embed(here / "run", "demo", **(USUAL | {"batch_size": 5}))
    np.testing.assert_array_equal(features[:20], read(source)[1])
    assert names[:20] == [source.name(index) for index in range(20)]


def test_features_are_the_mean_of_timms_feature_map(here: Path) -> None:
    names, features = embed(here)
    assert len(names) == len(features) == 13
    np.testing.assert_allclose(features, cells(here, names).mean(dim=1), rtol=1e-4, atol=1e-5)


def test_features_are_those_of_transformers(here: Path) -> None:
    names, features = embed(here)
    expected = cells(here, names, by_transformers=True).mean(dim=1)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_patches_are_timms_feature_map_row_by_row(here: Path) -> None:
    names, features = embed(here, patches=True)
    np.testing.assert_allclose(features, cells(here, names), rtol=1e-4, atol=1e-5)


def test_a_layer_and_the_class_token_can_be_taken(here: Path) -> None:
    _, last = embed(here, pool="token")
    _, first = embed(here, pool="token", layer=0)
    assert last.shape == first.shape == (13, 48)
    assert not np.allclose(last, first)


def read_back(path: Path) -> tuple[list[str], NDArray[Any]]:
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return arrays["names"].tolist(), arrays["features"]
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.ParquetFile(path).num_row_groups == 3
        table = parquet.read_table(path)
        return table["name"].to_pylist(), np.array(table["features"].to_pylist())
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:3] == ["name", "f0", "f1"]
    return [row[0] for row in rows], np.array([row[1:] for row in rows], np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", ["npz", "parquet", "csv"])
def test_a_file_holds_the_names_and_features(here: Path, tmp_path: Path, suffix: str, dtype: str) -> None:
    names, features = embed(here, dtype=dtype)
    lines = write(here, tmp_path / f"a.{suffix}", dtype=dtype)
    assert lines == [f"13 images, features (13, 48) {dtype}, are in {tmp_path}/a.{suffix}"]
    found, values = read_back(tmp_path / f"a.{suffix}")
    assert features.dtype == dtype
    np.testing.assert_array_equal(values.astype(dtype), features)
    assert {Path(name).name for name in found} >= set(ODD[:3])
    if suffix == "npz":
        assert found == names
    else:  # UTF-8 files cannot hold other bytes
        assert found == [name.encode(errors="backslashreplace").decode() for name in names]
        assert r"not-\udcff-utf8.png" in {Path(name).name for name in found}
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{suffix}"]


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_file_of_patches(here: Path, tmp_path: Path, suffix: str) -> None:
    write(here, tmp_path / f"a.{suffix}", patches=True)
    names, values = read_back(tmp_path / f"a.{suffix}")
    assert (len(names), values.shape) == (13, (13, 16, 48))
    np.testing.assert_array_equal(values.astype(np.float32), embed(here, patches=True)[1])


def killed_after(parts: int, monkeypatch: pytest.MonkeyPatch, here: Path, out: Path, **settings: Any) -> None:
    """Embed until so many parts are written."""
    save = module.FeatureFile.write

    def write_or_end(self: Any, number: int, part: Any) -> None:
        if number == parts:
            raise KeyboardInterrupt
        save(self, number, part)

    with monkeypatch.context() as patch:
        patch.setattr(module.FeatureFile, "write", write_or_end)
        with pytest.raises(KeyboardInterrupt):
            write(here, out, **settings)


@pytest.mark.parametrize("suffix", ["npz", "parquet", "csv"])
def test_a_killed_process_is_resumed_to_the_same_bytes(
    here: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / f"whole.{suffix}", tmp_path / f"broken.{suffix}"
    write(here, whole)
    killed_after(1, monkeypatch, here, broken)
    assert not broken.exists()
    first = (tmp_path / f"broken.{suffix}.parts/part-000000.npz").stat().st_mtime_ns
    killed_after(2, monkeypatch, here, broken)
    assert (tmp_path / f"broken.{suffix}.parts/part-000000.npz").stat().st_mtime_ns == first
    write(here, broken)
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [broken.name, whole.name]


def test_a_process_killed_before_it_removed_the_parts_is_resumed(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.npz"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(here, out)
    before = out.read_bytes()
    write(here, out)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_second_command_into_the_same_file_is_refused(here: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "a.npz.parts"), pytest.raises(UserError, match=r"a\.npz\.parts is in use by process"):
        write(here, tmp_path / "a.npz")
    write(here, tmp_path / "a.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_resume_with_other_settings_is_refused(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.npz"
    killed_after(1, monkeypatch, here, out)
    with pytest.raises(simmim.UserError) as error:
        write(here, out, layer=0, dtype="float16")
    assert str(error.value) == (
        f"{out}.parts was begun with other settings (layer -1 → 0, dtype float32 → float16); "
        "repeat that command to resume it, or remove the directory to start again"
    )


def test_an_encoder_that_was_trained_on_is_another_setting(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.npz"
    killed_after(1, monkeypatch, here, out)
    shutil.copytree(here / "run/encoder", tmp_path / "other")
    weights = bytearray((tmp_path / "other/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "other/model.safetensors").write_bytes(weights)
    with pytest.raises(simmim.UserError, match=r"\(encoder sha256 \w+ → sha256 \w+\)"):
        write(here, out, run=str(tmp_path / "other"))


def spoiled(here: Path, folder: Path, *names: str) -> Path:
    """A copy of the images, some of which cannot be read."""
    shutil.copytree(here / "images", folder)
    for name in names:
        (folder / name).write_bytes(b"no image")
    return folder


def test_unreadable_images_are_left_out_and_listed(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a whole part of them, and those of a part that a killed process wrote."""
    data = spoiled(here, tmp_path / "images", *(f"{number}.png" for number in range(7)))
    out, settings = tmp_path / "a.csv", {"data": str(data), "max_bad_fraction": 0.6}
    killed_after(2, monkeypatch, here, out, **settings)
    lines = write(here, out, **settings)
    listed = [line.split("\t")[0] for line in (tmp_path / "a.csv.bad_images.txt").read_text().splitlines()]
    assert listed == [f"{data}/{number}.png" for number in range(7)]
    assert lines[1] == f"7 images could not be read; {out}.bad_images.txt lists them"
    names, features = read_back(out)
    assert len(names) == len(features) == 6
    assert not set(names) & set(listed)


def test_too_many_unreadable_images_end_it(here: Path, tmp_path: Path) -> None:
    data = spoiled(here, tmp_path / "images", "0.png")
    with pytest.raises(simmim.UserError, match=r"^1 of 13 images .* cannot be read, such as .*0\.png"):
        write(here, tmp_path / "a.npz", data=str(data))
    assert not (tmp_path / "a.npz").exists()


def test_a_set_without_a_readable_image_is_refused(here: Path, tmp_path: Path) -> None:
    data = spoiled(here, tmp_path / "images", *(path.name for path in (here / "images").iterdir()))
    with pytest.raises(simmim.UserError, match="can be read"):
        write(here, tmp_path / "a.npz", data=str(data), max_bad_fraction=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--out is missing; give a .parquet, .npz or .csv file"),
        ("--out a.txt", "--out a.txt is none of .parquet, .npz, .csv; name such a file"),
        ("--out a.csv --patches", "--out a.csv takes one vector an image, and --patches gives many; "),
        ("--out a.npz --patches --pool token", "--pool token makes one vector an image, and --patches many; "),
        ("--out there.npz", "--out there.npz exists already; give a new file, or remove it"),
        ("--out a.npz --layer 7", "layer 7 is not among the encoder's 2 layers; use -2 to 1"),
        ("--out a.npz --dtype float64", "--dtype 'float64' is not known; choose from float32, float16"),
        ("--out images/0.png/a.npz", "images/0.png/a.npz.parts cannot be written: Not a directory; give another --out"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(
    here: Path, options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    Path("there.npz").touch()
    assert main(["embed", "run", "--data", "images", "--device", "cpu", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"simmim: {message}")
    assert error.count("\n") == 1
    assert not list(here.glob("a.*"))


def test_parquet_without_pyarrow_names_the_extra(here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(simmim.UserError, match=r"needs the package pyarrow; pip install 'simmim\[data\]'$"):
        write(here, tmp_path / "a.parquet")


def test_features_beyond_half_precision_are_refused() -> None:
    with pytest.raises(simmim.UserError, match=r"^feature 7e\+04 is beyond float16; use --dtype float32$"):
        module._rounded(np.array([[1, -7e4]], np.float32), "float16")


def test_two_processes_write_the_bytes_of_one(here: Path, tmp_path: Path) -> None:
    write(here, tmp_path / "one.npz")
    worker.run_together(_embed_small_parts, here, tmp_path / "two.npz", log=tmp_path / "log")
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def _embed_small_parts(here: Path, out: Path) -> None:
    module.PART_IMAGES = 5
    write(here, out)
