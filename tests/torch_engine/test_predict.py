"""`simmim predict`: the evaluation's own probabilities on new images, what is written, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import simmim
from simmim.cli import main
from simmim.config.tasks import ClassifyConfig
from simmim.config.toml import read_toml
from simmim.data.labelled.classes import open_labelled
from simmim.torch_engine.tasks import base, classify
from simmim.torch_engine.tasks.base import Predictor, evaluation_bad_images, find_spec
from simmim.torch_engine.tasks.classify import ClassifyTask
from simmim.training.run_directory import Run, mark_task

SMALL = "--image-size 32 --model vit_tiny_patch16_224 --batch-size 4 --steps 3 --device cpu --precision fp32"
SMALL += " --model-args depth=1 embed_dim=24 num_heads=1"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled photographs larger than the model's, a classifier of them with averaged weights, and a pretraining."""
    folder = tmp_path_factory.mktemp("predict")
    random = np.random.default_rng(0)
    for number in range(24):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = folder / f"data/{'ab'[number % 2]}/{number:02d}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((170, 130)).save(path)
    run = f"--data {folder}/data --out {folder}/run --from scratch --eval-crop 0.7 --ema-decay 0.5 --lr 0.1"
    assert main(["finetune", "classify", *run.split(), *SMALL.split()]) == 0
    pretraining = f"--data {folder}/data --out {folder}/pretraining --mask-cell 16 --val-images 2"
    assert main(["pretrain", *pretraining.split(), *SMALL.split()]) == 0
    return folder


def probabilities(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {Path(row["image"]).name: dict(row["top"]) for row in found["images"]}


def test_predictions_are_the_evaluations_probabilities(here: Path) -> None:
    config = read_toml(here / "run/config.toml", ClassifyConfig)
    data = open_labelled(str(here / "data"), seed=config.seed)
    task = ClassifyTask(config, data, None)
    step = task.build()
    assert step.average is not None
    averaged = classify.load_predictor(here / "run/model", "cpu").backbone.state_dict()
    step.average.load_state_dict(averaged)
    with torch.no_grad():
        every, bad_images = range(len(data.val)), evaluation_bad_images(config, data.val, here / "run")
        found = list(task.predict(step, every, bad_images))
    indices, expected = (np.concatenate([batch[place] for batch in found]) for place in (0, 2))
    again = probabilities(simmim.predict(here / "run", [data.val.name(int(index)) for index in indices]))
    for index, row in zip(indices, expected, strict=True):
        assert again[Path(data.val.name(int(index))).name] == dict(zip(data.classes, row.tolist(), strict=True))


def test_the_figures_of_the_run_follow_from_its_predictions(here: Path) -> None:
    data = open_labelled(str(here / "data"))
    found = simmim.predict(here / "run", [data.val.name(index) for index in range(len(data.val))])
    right = [row["label"] == Path(row["image"]).parent.name for row in found["images"]]
    assert np.mean(right) == json.loads((here / "run/metrics.json").read_text())["best"]["top1"]


def test_predictions_do_not_depend_on_the_batch(here: Path) -> None:
    one, seven = (simmim.predict(here / "run", here / "data", batch_size=size) for size in (1, 7))
    assert [row["image"] for row in one["images"]] == [row["image"] for row in seven["images"]]
    for name, row in probabilities(one).items():
        assert row == pytest.approx(probabilities(seven)[name], abs=1e-6)


def test_the_model_directory_alone_predicts_the_same(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "run/model", tmp_path / "moved")
    ran, moved = (simmim.predict(run, here / "data") for run in (here / "run", tmp_path / "moved"))
    assert ran["images"] == moved["images"]


def test_broken_images_are_left_out_and_listed(here: Path, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes((here / "data/a/00.png").read_bytes())
    (tmp_path / "2.png").write_text("no image")
    np.save(tmp_path / "3.npy", np.zeros((40, 40, 5), np.uint8))
    found = simmim.predict(here / "run", tmp_path)
    assert [Path(row["image"]).name for row in found["images"]] == ["1.png"]
    assert [(Path(bad["image"]).name, bad["reason"]) for bad in found["bad_images"]] == [
        ("2.png", "not an image in a format that is read here"),
        ("3.npy", "has 5 channels, not 3"),
    ]


def test_what_was_found_is_written_with_a_picture_of_each_image(here: Path, tmp_path: Path) -> None:
    found = simmim.predict(here / "run", here / "data/a", out=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == found
    assert len(found["images"]) == len(list((tmp_path / "out/pictures").iterdir())) == 12
    picture = np.asarray(Image.open(tmp_path / "out" / found["images"][0]["picture"])).astype(int)
    original = np.asarray(Image.open(found["images"][0]["image"]))
    assert np.abs(picture[:130] - original).mean() < 6  # a JPEG of it
    assert picture[130:].min() < 64  # black letters
    assert picture[130:].mean() > 192  # on white


def test_nothing_is_left_of_an_answer_that_came_to_an_error(here: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_text("no image")
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        simmim.predict(here / "run", tmp_path / "images", out=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_the_command_prints_one_json_object_with_as_many_classes_as_wanted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(here / "run"), str(here / "data/a/00.png"), "--top", "1", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["images"]
    assert row["top"] == [[row["label"], row["probability"]]]


def test_the_command_prints_a_line_an_image(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(here / "run"), str(here / "data/a/00.png"), str(here / "data/b/01.jpg")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("data/a/00.png")
    assert second.endswith("data/b/01.jpg")


class Stub(Predictor):
    """What a task other than classification answers."""

    channels = 3
    dtype = np.dtype(np.uint8)

    def __init__(self, answer: dict[str, Any]):
        self.answer = answer

    def predict(self, images: Any) -> list[dict[str, Any]]:
        return [{**self.answer, **self._mask(image)} for image in images]

    def _mask(self, image: NDArray[Any]) -> dict[str, Any]:
        return {"mask": image[..., 0] // 128} if "shares" in self.answer else {}

    def draw(self, image: NDArray[Any], prediction: dict[str, Any]) -> NDArray[np.uint8]:
        return image


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(task: str, answer: dict[str, Any]) -> Path:
        spec = dataclasses.replace(find_spec(task), load_predictor=lambda directory, device: Stub(answer))
        monkeypatch.setitem(base._REGISTERED, task, spec)
        mark_task(Run(tmp_path / "run").model, task)
        return tmp_path / "run"

    return make


def test_masks_are_written_in_the_size_of_their_images(here: Path, tmp_path: Path, stub: Any) -> None:
    run = stub("segment", {"shares": {"sky": 0.25, "sea": 0.75}})
    [row] = simmim.predict(run, here / "data/a/00.png", out=str(tmp_path / "out"))["images"]
    mask = np.asarray(Image.open(tmp_path / "out" / row["mask"]))
    assert (mask == np.asarray(Image.open(here / "data/a/00.png"))[..., 0] // 128).all()


def test_a_mask_that_is_not_written_is_left_out_of_the_answer(here: Path, stub: Any) -> None:
    [row] = simmim.predict(stub("segment", {"shares": {"sky": 1.0}}), here / "data/a/00.png")["images"]
    assert set(row) == {"image", "shares"}


@pytest.mark.parametrize(
    ("task", "answer", "line"),
    [
        ("segment", {"shares": {"sky": 0.25, "sea": 0.75, "sand": 0.0}}, "sea 75.0%, sky 25.0%"),
        ("detect", {"boxes": [{"label": "dog", "score": 0.5, "box": [0, 0, 9, 9]}]}, "dog 0.500"),
        ("detect", {"boxes": []}, "nothing"),
    ],
)
def test_other_tasks_have_a_line_an_image_too(
    task: str, answer: dict[str, Any], line: str, here: Path, stub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(stub(task, answer)), str(here / "data/a/00.png")]) == 0
    assert capsys.readouterr().out == f"{line}  {here}/data/a/00.png\n"


def test_the_number_of_classes_is_for_classifiers(here: Path, stub: Any) -> None:
    with pytest.raises(ValueError, match=r"^--top is for classifiers, and .* is fine-tuned for detect; leave it out$"):
        simmim.predict(stub("detect", {"boxes": []}), here / "data", top=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "pretraining data",
            "pretraining is a pretraining; fine-tune it first: "
            "simmim finetune classify --from pretraining --data LABELLED --out RUN2",
        ),
        ("begun data", "begun has no model yet; wait for its first evaluation (--eval-every-epochs)"),
        ("data data", "data is not a fine-tuned run; give the --out directory of simmim finetune"),
        ("run", "no image is given; name files, a folder, a list, hf:NAME or demo after the run"),
        ("run data/a/00.png nowhere.png", "nowhere.png does not exist; give image files, or one folder, list, hf:NAME"),
        ("run empty", "folder empty holds no images; files read end in .avif"),
        (
            "run bands",
            "none of 2 images can be read, such as bands/0.npy: has 5 channels, not 3; "
            "give images like those that the model was trained on",
        ),
        ("run data --out data", "--out data exists already; give a new directory"),
        ("run data --top 0", "top 0 is less than 1; leave it out for the default"),
    ],
)
def test_predicting_refuses_in_one_line(
    words: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    for name in ("empty", "bands", "begun"):
        Path(name).mkdir(exist_ok=True)
    Path("begun/config.toml").write_text(Path("run/config.toml").read_text())
    for number in range(2):
        np.save(f"bands/{number}.npy", np.zeros((40, 40, 5), np.uint8))
    assert main(["predict", *words.split()]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"simmim: {message}")
    assert shown.count("\n") == 1


def test_a_fine_tuned_run_is_not_asked_to_reconstruct(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reconstruct", str(here / "run"), str(here / "data")]) == 2
    line = f"{here / 'run'} is fine-tuned for classify, and reconstructs nothing; give the run that it began from"
    assert capsys.readouterr().err == f"simmim: {line}\n"
