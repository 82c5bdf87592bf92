"""`import simmim` and `simmim --help` are fast: heavy libraries load on first use."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "timm", "grain", "cv2", "PIL", "numpy", "pydantic", "tyro", "rich", "tensorboardX")
HEAVY += ("transformers", "datasets", "keras", "jax", "matplotlib")


def loaded_by(code: str, *, hide: str = "") -> set[str]:
    """The top-level modules that a fresh Python has loaded after `code`; `hide` cannot be imported in it."""
    hidden = f"sys.modules[{hide!r}] = None" if hide else ""
    script = f"import sys\n{hidden}\n{code}\nprint()\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return {name.split(".")[0] for name in result.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    "code",
    [
        "import simmim",
        "from simmim.cli import main; main(['--help'])",
        "from simmim.cli import main; main(['--version'])",
        "from simmim.cli import main; main(['pretrian'])",
    ],
)
def test_no_heavy_library_loads(code):
    assert not loaded_by(code) & set(HEAVY)


@pytest.mark.parametrize("options", ["--help", "--data nowhere --out run", "--recipe no-such", "--config nowhere.toml"])
def test_the_options_of_pretrain_are_shown_and_judged_without_torch(options: str):
    code = f"from simmim.cli import main\ntry: main('pretrain {options}'.split())\nexcept SystemExit: pass"
    assert not loaded_by(code) & {"torch", "timm", "grain", "cv2", "tensorboardX", "transformers"}


MISTAKES = """
finetune classify --data nowhere --from scratch --out a
finetune classify --data demo --from nowhere --out a
finetune detect --data images.zip --from scratch --out a
finetune classify --data demo --from scratch --out a --steps 0
pretrain --data demo --out a --init-from nowhere
pretrain --data demo --out a --init-from local-dir:nowhere
pretrain --data demo --out a --probe nowhere
probe nowhere --data demo
probe timm:resnet18 --data nowhere
probe timm:resnet18 --data demo --k 0
embed nowhere --data demo --out a.npz
embed timm:resnet18 --data nowhere --out a.npz
embed timm:resnet18 --data demo
search nowhere --data demo --query images.tgz
search timm:resnet18 --data demo --query nowhere.png
predict nowhere demo
reconstruct nowhere demo
reconstruct run nowhere
convert nowhere.pth --out a
export nowhere --format timm --out a
bench --data nowhere
bench --seconds 0
report nowhere
"""


def test_mistakes_in_arguments_and_paths_are_told_without_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images.zip", "images.tgz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text('model = "resnet18"\n')
    code = (
        "from simmim.cli import main\n"
        f"for words in {MISTAKES.strip().splitlines()}:\n"
        "    assert main(words.split()) == 2, words\n"
        "    assert not {'torch', 'timm'} & set(sys.modules), words"
    )
    assert not loaded_by(code) & {"torch", "timm", "grain", "cv2", "tensorboardX", "transformers"}


def test_runs_are_listed_without_torch(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.toml").write_text('model = "resnet18"\n')
    code = f"from simmim.cli import main\nassert main(['runs', {str(tmp_path)!r}]) == 0"
    assert not loaded_by(code) & {"torch", "timm", "grain", "cv2", "tensorboardX", "transformers"}


def test_simmim_imports_without_torchvision():
    assert "simmim" in loaded_by("import simmim; simmim.PretrainConfig", hide="torchvision")


def test_every_public_name_can_be_had():
    import simmim

    assert all(getattr(simmim, name) is not None for name in simmim.__all__)


def test_a_listing_shows_the_public_names_alone():
    import simmim

    assert dir(simmim) == sorted(simmim.__all__)


def test_an_unknown_name_is_an_attribute_error():
    import simmim

    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = simmim.train
