"""`simmim search`: neighbours equal a search by hand, from files and anew; duplicates; what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import simmim
from simmim.cli import main
from simmim.commands.search import SearchConfig, describe, search
from simmim.errors import UserError

from .test_report import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("search")
    (found / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(
            found / "images" / f"{number:02}.png"
        )
    Image.open(found / "images" / "03.png").save(found / "images" / "copy.jpg", quality=90)
    Image.new("RGB", (64, 64)).save(found / "images" / "black1.png")
    Image.new("RGB", (64, 64)).save(found / "images" / "black2.png")
    (found / "images" / "broken.png").write_bytes(b"broken")
    own = {"data": str(found / "images"), "out": str(found / "run"), "val_images": 0, "max_bad_fraction": 0.5}
    simmim.pretrain(**TINY | own, steps=1)
    return found


def settings(folder: Path, **more: Any) -> SearchConfig:
    given: dict[str, Any] = {"run": str(folder / "run"), "data": str(folder / "images"), "device": "cpu"}
    return SearchConfig(**given | more)


@pytest.mark.parametrize("suffix", [None, ".npz", ".parquet"])
def test_neighbours_are_those_of_the_greatest_cosine(folder: Path, tmp_path: Path, suffix: str | None) -> None:
    names, features = simmim.embed(folder / "run", folder / "images", device="cpu", max_bad_fraction=0.5)
    file = None
    if suffix:
        file = str(tmp_path / f"features{suffix}")
        simmim.embed(folder / "run", folder / "images", device="cpu", max_bad_fraction=0.5, out=file)
    query = str(folder / "images" / "03.png")
    [found] = search(settings(folder, query=(query,), count=4, features=file, out=str(tmp_path / "a.png")))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    mine = names.index(query)
    similarity = unit @ unit[mine]
    order = [place for place in np.argsort(-similarity, kind="stable") if place != mine][:4]
    assert found["query"] == query
    assert [near["name"] for near in found["neighbours"]] == [names[place] for place in order]
    assert [near["similarity"] for near in found["neighbours"]] == pytest.approx(similarity[order], abs=1e-5)
    assert Path(found["neighbours"][0]["name"]).name == "copy.jpg"
    assert Image.open(tmp_path / "a.png").size == (5 * 128 + 4 * 6, 128 + 6)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_features_of_another_encoder_are_refused(folder: Path, tmp_path: Path, suffix: str) -> None:
    """Of the same width, which the numbers do not tell."""
    out, query = tmp_path / "other", (str(folder / "images" / "03.png"),)
    own = {"data": str(folder / "images"), "out": str(out), "val_images": 0, "max_bad_fraction": 0.5, "seed": 1}
    simmim.pretrain(**TINY | own, steps=1)
    file = str(tmp_path / f"a{suffix}")
    simmim.embed(out, folder / "images", device="cpu", max_bad_fraction=0.5, out=file)
    assert search(settings(folder, run=str(out), query=query, features=file))
    with pytest.raises(UserError, match=r"was made by another encoder \(sha256 \w+\) than that of .* \(sha256 \w+\); "):
        search(settings(folder, query=query, features=file))


def test_queries_are_embedded_as_the_file_was(folder: Path, tmp_path: Path) -> None:
    query, file = (str(folder / "images" / "03.png"),), str(tmp_path / "a.npz")
    simmim.embed(folder / "run", folder / "images", device="cpu", max_bad_fraction=0.5, out=file, pool="token")
    [found] = search(settings(folder, query=query, features=file))
    with np.load(file) as arrays:
        names, features = arrays["names"].tolist(), arrays["features"]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    mine = unit[names.index(query[0])]
    near = found["neighbours"][0]
    assert near["similarity"] == pytest.approx(float(unit[names.index(near["name"])] @ mine), abs=1e-5)


def test_a_file_that_does_not_tell_its_encoder_is_warned_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, features = simmim.embed(folder / "run", folder / "images", device="cpu", max_bad_fraction=0.5)
    np.savez(tmp_path / "old.npz", names=np.array(names), features=features)
    query = (str(folder / "images" / "03.png"),)
    assert search(settings(folder, query=query, features=str(tmp_path / "old.npz")))
    assert "does not say which encoder made it" in capsys.readouterr().err


def test_duplicates_are_copies_and_no_blanks(folder: Path, tmp_path: Path) -> None:
    [pair] = search(settings(folder, duplicates=True, out=str(tmp_path / "pairs.png")))
    assert [Path(name).name for name in pair["names"]] == ["03.png", "copy.jpg"] and pair["correlation"] > 0.98
    assert (tmp_path / "pairs.png").is_file()


def test_the_command_prints_text_or_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", str(folder / "run"), "--data", str(folder / "images"), "--query", str(folder / "images/00.png")]
    assert main([*words, "--count", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("00.png") and len(lines) == 3
    assert main([*words, "--count", "2", "--device", "cpu", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["neighbours"]) == 2


def test_a_file_is_not_its_own_neighbour_by_another_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    [found] = search(settings(folder, query=("./images/../images/05.png",)))
    assert "05.png" not in [Path(near["name"]).name for near in found["neighbours"]]


def test_nothing_found_is_told() -> None:
    assert describe([]) == ["no likely duplicates"]


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    query = (str(folder / "images" / "00.png"),)
    for more, message in [
        ({}, "needs --query IMAGE or --duplicates, and not both"),
        ({"query": query, "duplicates": True}, "needs --query IMAGE or --duplicates, and not both"),
        ({"query": query, "out": "a.jpg"}, "--out a.jpg is not a .png file"),
        ({"query": query, "features": str(tmp_path / "nowhere.npz")}, "nowhere.npz cannot be read as features"),
        ({"query": query, "features": "a.csv"}, r"a.csv is no .npz or .parquet file"),
    ]:
        with pytest.raises(UserError, match=message):
            search(settings(folder, **more))
    for suffix in ("npz", "parquet"):
        file = str(tmp_path / f"patches.{suffix}")
        simmim.embed(folder / "run", folder / "images", device="cpu", max_bad_fraction=0.5, out=file, patches=True)
        with pytest.raises(UserError, match="of patches"):
            search(settings(folder, query=query, features=file))
    with pytest.raises(UserError, match=r"broken.png cannot be read; give other images as --query"):
        search(settings(folder, query=(*query, str(folder / "images" / "broken.png"))))
    np.savez(tmp_path / "other.npz", names=np.array(["x"]), features=np.zeros((1, 24), np.float32))
    with pytest.raises(UserError, match="has images that --data has not, such as x"):
        search(settings(folder, query=query, features=str(tmp_path / "other.npz")))
