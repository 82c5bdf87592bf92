"""Reading `.pth` files: what torch reads, and nothing run."""

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from simmim.interop.pickles import StoredTensor, UnsafePickleError, read_pickle

REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference" / "simmim_official"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs ../shared/reference")


class WritesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def contents():
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return {
        "whole": base,
        "transposed": base.t(),
        "row": base[2],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "long": torch.arange(5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(base),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_are_those_that_torch_reads(zipped, tmp_path):
    torch.save(contents(), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_pickle(tmp_path / "a.pth")
    assert list(read) == list(contents())
    for name, tensor in contents().items():
        assert np.array_equal(read[name].array(), tensor.detach().float().numpy()), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(zipped, tmp_path):
    victim = tmp_path / "victim"
    state = {"model": {"a": torch.zeros(1)}, "config": WritesAFile(victim)}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafePickleError, match=r"is refused: it asks to run \w+\.system"):
        read_pickle(tmp_path / "a.pth")
    assert not victim.exists()


def test_the_malicious_pickle_of_these_tests_does_write_when_run(tmp_path):
    pickle.loads(pickle.dumps(WritesAFile(tmp_path / "victim")))
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "call",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"(S'1'\nios\nsystem\n.",  # INST
        b"(cbuiltins\nexec\nS'1'\no.",  # OBJ
        b"cbuiltins\ngetattr\n(cbuiltins\nobject\nS'__subclasses__'\ntR.",
    ],
)
def test_no_opcode_calls_what_a_file_names(call, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", call)
    with pytest.raises(UnsafePickleError):
        read_pickle(tmp_path / "a.pth")


def test_an_object_of_an_unknown_class_becomes_a_record_of_its_attributes(tmp_path):
    torch.save({"args": argparse.Namespace(model="mae_vit_base_patch16", blr=1e-3)}, tmp_path / "a.pth")
    assert read_pickle(tmp_path / "a.pth")["args"] == {"model": "mae_vit_base_patch16", "blr": 1e-3}


def test_numpy_scalars_are_numbers(tmp_path):
    torch.save({"best": np.float64(81.5), "epoch": np.int32(7)}, tmp_path / "a.pth")
    assert read_pickle(tmp_path / "a.pth") == {"best": 81.5, "epoch": 7}


@needs_reference
def test_yacs_configuration_is_read_without_yacs():
    config = read_pickle(REFERENCE / "swin" / "official_pretrain.pth")["config"]
    assert config["MODEL"]["SWIN"]["DEPTHS"] == [2, 2, 2, 2]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused_in_one_line(zipped, share, tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.randn(500)}}, buffer, _use_new_zipfile_serialization=zipped)
    (tmp_path / "a.pth").write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    with pytest.raises(ValueError, match=r"a\.pth is damaged or not a PyTorch checkpoint: [^\n]+$"):
        read_pickle(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(3, (4,), (1,)), (0, (4,), (9,)), (-1, (2,), (1,)), (5, (1,), (1,))]
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(offset, size, stride, tmp_path):
    torch.save({"a": torch.zeros(5)}, tmp_path / "a.pth")
    honest = read_pickle(tmp_path / "a.pth")["a"]
    with pytest.raises(ValueError, match="reaches beyond its 5 stored numbers"):
        StoredTensor(honest.storage, offset, size, stride, honest.read).array()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "a.pth").write_text("hello")
    with pytest.raises(ValueError, match="is damaged or not a PyTorch checkpoint"):
        read_pickle(tmp_path / "a.pth")
