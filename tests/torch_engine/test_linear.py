"""Linear classifiers against scikit-learn, and as models that `simmim predict` runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import simmim
from simmim.cli import main
from simmim.data.labelled.classes import hold_out
from simmim.errors import UserError
from simmim.torch_engine.tasks import probe as tasks_probe
from simmim.torch_engine.tasks.linear import choose_penalty, fit_linear, fit_logistic, logits
from simmim.torch_engine.train.storage import save_hub

from . import tiny


def clouds(
    seed: int, *, images: int = 90, classes: int = 3, features: int = 8, spread: float = 1.5
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) that overlap, and their labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centres = np.random.default_rng(0).normal(size=(classes, features))
    return (centres[labels] + spread * rng.normal(size=(images, features))).astype(np.float32), labels


def learnt(x: np.ndarray, y: np.ndarray, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=10_000).fit(x, y)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_logistic_regression_gives_the_probabilities_of_scikit_learn(penalty: float):
    x, y = clouds(1)
    weights = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 3, penalty=penalty)
    probabilities = logits(torch.from_numpy(x), weights).softmax(dim=1).numpy()
    np.testing.assert_allclose(probabilities, learnt(x, y, penalty).predict_proba(x), atol=1e-3)


def test_the_penalty_has_the_least_held_out_cross_entropy():
    x, y = clouds(1, features=40, spread=2.5)
    held = hold_out(y, 0.2, seed=0)
    penalties = [10.0**-power for power in range(7)]
    models = [learnt(x[~held], y[~held], penalty) for penalty in penalties]
    losses = [log_loss(y[held], model.predict_proba(x[held])) for model in models]
    chosen = choose_penalty(torch.from_numpy(x), torch.from_numpy(y), 3, held=held)
    assert chosen == penalties[int(np.argmin(losses))]
    assert chosen not in (penalties[0], penalties[-1])


def test_the_linear_probe_predicts_as_scikit_learn_from_standardised_features():
    (x, y), (val, val_labels) = clouds(1), clouds(2)
    scale = np.float32(10.0) ** np.arange(-4, 4, dtype=np.float32)
    found = fit_linear(x * scale, y, 3, seed=0, device=torch.device("cpu"))
    predictions = found.classify(val * scale)
    mean, std = x.mean(axis=0), x.std(axis=0)
    expected = learnt((x - mean) / std, y, found.penalty).predict((val - mean) / std)
    assert (predictions == expected).mean() > 0.98
    assert (predictions == val_labels).mean() > 0.6


def test_one_label_a_class_is_enough_for_a_linear_probe():
    (x, y), (val, val_labels) = clouds(1), clouds(2)
    found = fit_linear(x[:3], y[:3], 3, seed=0, device=torch.device("cpu"))
    assert found.penalty == 1e-2
    assert (found.classify(val) == val_labels).mean() > 1 / 3


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 64 pixels in three classes, which differ by colour, so that some answers are right and some wrong.

    Outside the crop that evaluation sees, test images have the colour of another class.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    colours = np.array([[150, 110, 110], [110, 150, 110], [110, 110, 150]])
    pixels = colours[labels][:, None, None] + rng.normal(0, 40, (60, 1, 1, 3)) + rng.normal(0, 20, (60, 64, 64, 3))
    pixels[:30, :4] = pixels[:30, -4:] = 0
    pixels[30:, :4] = pixels[30:, -4:] = 255 * np.eye(3)[(labels[30:] + 1) % 3][:, None, None]
    images = pixels.clip(0, 255).astype(np.uint8)
    file = tmp_path_factory.mktemp("shapes") / "shapes.npz"
    np.savez(file, x_train=images[:30], y_train=labels[:30], x_test=images[30:], y_test=labels[30:])
    np.savez(file.with_name("test.npz"), images=images[30:])
    return file


def save(kind: str, directory: Path) -> Path:
    """Write a small encoder with random weights, norms and tokens included, as a run does."""
    backbone = tiny.encoder(kind, size=(64, 64)).backbone
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    save_hub(directory, backbone, backbone.state_dict(), tiny.config(kind))
    return directory


KINDS = (
    "vit",
    "vit with class and register tokens",
    "vit that pools by attention",
    "beit with a shared bias",
    "swin",
    "resnet18",
    "convnext",
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_classifier_that_a_probe_writes_answers_as_the_probe(kind: str, shapes: Path, tmp_path: Path):
    encoder, out = save(kind, tmp_path / "encoder"), tmp_path / "classifier"
    told = {"method": "linear", "device": "cpu", "precision": "fp32", "baselines": False}
    found = simmim.probe(str(encoder), str(shapes), out=str(out), **told)
    predicted = simmim.predict(str(out), str(shapes.with_name("test.npz")), device="cpu")["images"]
    with np.load(shapes) as arrays:
        right = [image["label"] == str(label) for image, label in zip(predicted, arrays["y_test"], strict=True)]
    assert found["top1"] == pytest.approx(np.mean(right))
    assert len({image["label"] for image in predicted}) > 1 and found["top1"] < 1
    assert found["classifier"] == str(out)
    if kind not in ("convnext", "vit that pools by attention"):  # which have a norm after the mean
        assert found["top1"] == pytest.approx(simmim.probe(str(encoder), str(shapes), **told)["top1"], abs=0.04)


def test_a_written_classifier_loads_elsewhere_and_can_be_trained_further(shapes: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    encoder, out = save("resnet18", tmp_path / "encoder"), tmp_path / "classifier"
    told = json.loads((encoder / "config.json").read_text())
    told["model_args"]["num_classes"] = 10  # as timm's save_for_hf may leave it
    (encoder / "config.json").write_text(json.dumps(told))
    simmim.probe(str(encoder), str(shapes), method="linear", out=str(out), device="cpu", baselines=False)
    images = torch.randn(2, 3, 64, 64)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
    assert list(theirs.config.id2label.values()) == ["0", "1", "2"]
    with torch.no_grad():
        by_timm = timm.create_model(f"local-dir:{out}", pretrained=True).eval()(images)
        torch.testing.assert_close(theirs(images).logits, by_timm)
    assert main(["export", str(out), "--format", "timm", "--out", str(tmp_path / "timm")]) == 0
    run = simmim.finetune(
        "classify", init=str(out), data=str(shapes), out=str(tmp_path / "run"), steps=1, batch_size=8, device="cpu"
    )
    assert run.model.is_dir()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "--method is knn; add --method linear"),
        (["--method", "linear", "--layer", "0"], "not --layer 0; leave that out"),
        (["--method", "linear", "--pool", "token"], "not --pool token; leave that out"),
    ],
)
def test_a_classifier_that_cannot_be_written_is_refused_in_one_line(
    options: list[str], line: str, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    encoder, out = save("vit", tmp_path / "encoder"), tmp_path / "classifier"
    assert main(["probe", str(encoder), "--data", str(shapes), "--out", str(out), *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(line)
    assert not out.exists()


@pytest.mark.parametrize("prefix", ["timm:", "local-dir:"])
def test_no_classifier_of_timms_models_is_written(prefix: str, shapes: Path, tmp_path: Path):
    name = "timm:resnet18" if prefix == "timm:" else f"local-dir:{save('vit', tmp_path / 'encoder')}"
    remedy = "use" if prefix == "timm:" else "give its directory alone, or use"
    with pytest.raises(UserError, match=f"{name} is read as timm's; {remedy} simmim finetune classify --from {name}"):
        simmim.probe(name, str(shapes), method="linear", out=str(tmp_path / "classifier"))


@pytest.mark.parametrize(("out", "precision"), [(False, "auto"), (True, "fp32")])
def test_a_classifier_is_learnt_in_the_precision_in_which_it_predicts(
    out: bool, precision: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    monkeypatch.setattr(tasks_probe, "choose_precision", lambda precision, _: asked.append(precision) or "fp32")
    encoder, written = save("resnet18", tmp_path / "encoder"), str(tmp_path / "classifier") if out else None
    simmim.probe(str(encoder), str(shapes), method="linear", out=written, device="cpu", baselines=False)
    assert asked == [precision]


def test_no_classifier_is_written_that_timm_reads_otherwise(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder, out = save("resnet18", tmp_path / "encoder"), tmp_path / "classifier"
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **{**given, "pretrained": False}))
    with pytest.raises(UserError, match=r"timm reads another classifier than that of .*, so nothing was written"):
        simmim.probe(str(encoder), str(shapes), method="linear", out=str(out), device="cpu", baselines=False)
    assert not out.exists()


def test_a_classifier_replaces_nothing(shapes: Path, tmp_path: Path):
    encoder, out = save("vit", tmp_path / "encoder"), tmp_path / "classifier"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already; give a new directory"):
        simmim.probe(str(encoder), str(shapes), method="linear", out=str(out))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
