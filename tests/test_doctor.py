import builtins
import importlib.metadata

import numpy
import pytest
import torch

from simmim.commands import doctor
from simmim.commands.doctor import examine
from simmim.torch_engine.perf import kernel_choice


@pytest.fixture(autouse=True)
def no_trials(monkeypatch):
    """They take seconds; tests/test_tpu_check.py and test_kernels.py try them."""
    monkeypatch.setattr(doctor, "try_compiler", lambda: "yes")
    monkeypatch.setattr(kernel_choice, "measure_kernels", lambda _: {"linear": {"default": 0.002, "onednn": 0.001}})


def test_kernels_are_timed_in_both_ways():
    findings = examine()
    assert findings["linear layers of resnet50 in fp32"] == "default 2.0 ms, onednn 1.0 ms; onednn is used"


def test_versions_are_those_installed():
    findings = examine()
    assert findings["numpy"] == numpy.__version__
    assert findings["torch"] == importlib.metadata.version("torch")


def test_every_library_that_simmim_needs_is_listed():
    needed = {"torch", "torchvision", "timm", "safetensors", "numpy", "Pillow", "grain", "simplejpeg", "tyro", "rich"}
    assert needed <= set(examine())


def test_what_there_is_for_tpus_is_listed():
    findings = examine()
    assert {"tpu", "compiling for TPUs", "torch_tpu", "libtpu"} <= set(findings)


def test_training_was_tried_on_every_device():
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    findings = examine()
    assert all(findings[f"training on {device}"].startswith("works in ") for device in devices)


def test_a_device_that_fails_is_a_finding_and_no_error(monkeypatch):
    def fail(*_args, **_settings):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr("simmim.torch_engine.perf.trial.build_update", fail)
    assert examine()["training on cpu"] == "does not work: no kernel image is available"


def test_an_installation_without_torch_is_a_finding_and_no_error(monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args):
        if name.startswith("simmim.torch_engine"):
            raise ImportError("libtorch.so is missing")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert examine()["training"] == "does not work: libtorch.so is missing; install simmim again"


def test_a_copy_that_is_not_installed_is_said_in_a_line(monkeypatch):
    installed = importlib.metadata.Distribution.from_name

    def hide(name):
        if name == "simmim":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", hide)
    assert examine()["simmim"] == "not installed, so what it needs is not known; pip install . in its checkout"
