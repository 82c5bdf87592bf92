"""Against the official SimMIM: its weights, features, reconstruction, and its first steps of AdamW.

The numbers are in ../shared/reference/simmim_official, whose README says how they were made.
"""

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simmim.method.losses import L1Loss
from simmim.method.targets import PixelTarget
from simmim.torch_engine.models.encoders import create_encoder
from simmim.torch_engine.models.heads import LinearDecoder
from simmim.torch_engine.models.masked_image_model import MaskedImageModel
from simmim.torch_engine.train.optim import create_optimizer, has_weight_decay

from . import tiny

pytestmark = pytest.mark.skipif(not tiny.REFERENCE.is_dir(), reason=f"{tiny.REFERENCE} is not there")
MODELS = {
    "vit": (
        "beit_base_patch16_224",
        (96, 96),
        {
            "embed_dim": 96,
            "depth": 3,
            "num_heads": 3,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "init_values": 0.1,
        },
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        (128, 128),
        {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4},
    ),
}


@dataclass(frozen=True)
class Official:
    """The official numbers, and our model with the official weights."""

    numbers: dict[str, NDArray[Any]]
    no_weight_decay: set[str]
    model: MaskedImageModel

    @property
    def images(self) -> torch.Tensor:
        return torch.from_numpy(self.numbers["images"])

    @property
    def mask(self) -> torch.Tensor:
        return torch.from_numpy(self.numbers["mask"]).bool()


class PlainUnpickler(pickle.Unpickler):
    """Reads tensors and containers; whatever else a file names becomes an inert dictionary."""

    plain = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "__builtin__.set", "builtins.set")

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if f"{module}.{name}" in self.plain else type(name, (dict,), {})


def our_name(official: str) -> str:
    """Official parameter names → ours; the official Swin merges patches after a stage, timm's before the next."""
    name = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", official)
    if name == "encoder.mask_token":
        return name
    return name.replace("decoder.0.", "head.").replace("encoder.", "encoder.backbone.")


@pytest.fixture(params=MODELS)
def official(request: pytest.FixtureRequest) -> Official:
    folder: Path = tiny.REFERENCE / request.param
    name, size, arguments = MODELS[request.param]
    reader = SimpleNamespace(Unpickler=PlainUnpickler, __name__="reader")
    saved = torch.load(folder / "official_pretrain.pth", weights_only=False, pickle_module=reader)["model"]
    encoder = create_encoder(name, image_size=size, model_args=arguments)
    head = LinearDecoder(encoder.num_features, 3 * encoder.stride**2)
    model = MaskedImageModel(encoder, head, PixelTarget(), L1Loss())
    weights = {our_name(entry): tensor for entry, tensor in saved.items()}
    weights["head.weight"] = weights["head.weight"].flatten(1)  # a 1 × 1 convolution
    own = model.state_dict()
    assert set(own) <= set(weights)
    model.load_state_dict({entry: weights[entry] for entry in own})
    settings = json.loads((folder / "reference.json").read_text())
    numbers = dict(np.load(folder / "reference.npz"))
    return Official(numbers, {our_name(entry) for entry in settings["no_weight_decay"]}, model.train())


@torch.no_grad()
def test_features_are_the_official_ones(official: Official) -> None:
    features = official.model.eval().encoder(official.images, official.mask).permute(0, 3, 1, 2)
    np.testing.assert_allclose(features.numpy(), official.numbers["features"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_reconstruction_is_the_official_one(official: Official) -> None:
    _, reconstruction = official.model.eval()(official.images, official.mask)
    np.testing.assert_allclose(reconstruction.numpy(), official.numbers["reconstruction"], atol=1e-5, rtol=0)


def test_steps_of_adamw_have_the_official_losses_and_gradient_norms(official: Official) -> None:
    model, losses, norms = official.model, [], []
    optimizer = create_optimizer(model, weight_decay=0.05, betas=(0.9, 0.999), device=torch.device("cpu"))
    for group in optimizer.param_groups:
        group["lr"] = 5e-4
    for _ in official.numbers["losses"]:
        loss, _ = model(official.images, official.mask)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    losses.append(float(model(official.images, official.mask)[0].detach()))
    expected = [*official.numbers["losses"], float(official.numbers["loss_after"])]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(norms, official.numbers["grad_norms"], rtol=2e-3)


def test_the_official_parameters_are_exempt_from_weight_decay(official: Official) -> None:
    model = official.model
    exempt = {name for name, parameter in model.named_parameters() if not has_weight_decay(model, name, parameter)}
    assert exempt == official.no_weight_decay
