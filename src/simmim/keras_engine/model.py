"""The method on one page, as in the PyTorch engine: hide patches, encode, predict and judge the hidden ones only.

Shapes: `B` images, `C` channels, `H W` pixels, `p` patch side, `s` stride of the feature map (both in pixels),
`h w` = `H/s W/s` feature-map cells, `D` features, `P` predicted values a cell.
"""

import keras
import numpy as np

from simmim.config.pretraining import PretrainConfig
from simmim.keras_engine import weights
from simmim.keras_engine.architectures import Architecture, find_architecture
from simmim.keras_engine.encoders import Encoder, TokenEncoder
from simmim.keras_engine.first_values import first_values
from simmim.keras_engine.heads import create_head
from simmim.keras_engine.layers import Array, Module, ops
from simmim.keras_engine.resnet import ConvEncoder
from simmim.keras_engine.swin import SwinEncoder
from simmim.method.losses import Loss
from simmim.method.targets import Target
from simmim.training.plan import check_sizes

_ENCODERS = {"vit": TokenEncoder, "beit": TokenEncoder, "swin": SwinEncoder, "resnet": ConvEncoder}


class MaskedImageModel(Module):
    """Encoder + head + target + loss (SimMIM §3).

    Takes a batch from the input pipeline: image (B, H, W, C) in 0..255, flip (B, axes), mask (B, H/p, W/p) with
    True = hidden, drop_path (B, layers). Flips and normalises on the device, so that images cross to it as small
    integers. Returns the loss, a scalar; the prediction (B, h, w, P); and the sums whose ratio is the loss, (2,).
    """

    def __init__(
        self,
        encoder: Encoder,
        head: keras.layers.Layer,
        target: Target,
        loss: Loss,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__("model")
        self.encoder = encoder
        self.head = head
        self.target = target
        self.loss = loss
        self.mean = np.array(mean, np.float32) * 255
        self.scale = np.float32(1) / (np.array(std, np.float32) * 255)

    def call(self, batch: dict[str, Array], training: bool = False) -> tuple[Array, Array, Array]:
        images = (ops.cast(batch["image"], "float32") - self.mean) * self.scale
        for column, axis in zip(range(batch["flip"].shape[1]), (2, 1), strict=False):
            images = ops.where(batch["flip"][:, column, None, None, None], ops.flip(images, axis=axis), images)
        features = self.encoder(images, batch["mask"], batch.get("drop_path"), training=training)
        prediction = ops.cast(self.head(features), "float32")
        target = self.target(ops, images, self.encoder.stride)
        weights = self.target.weights(ops, batch["mask"], self.encoder.patch_size, self.encoder.stride)
        sums = self.loss.sums(ops, prediction, target, weights)
        return self.loss.mean(*sums), prediction, ops.stack(sums)

    def has_weight_decay(self, variable: keras.Variable) -> bool:
        """Return whether a parameter decays: not if it is 1-D, a bias, or in the encoder's `without_decay`."""
        name = weights.torch_name(variable)
        return len(variable.shape) > 1 and not name.endswith(".bias") and name not in self.encoder.without_decay


def architecture_of(config: PretrainConfig) -> Architecture:
    return find_architecture(config.model).with_arguments(config.model_args)


def build_model(config: PretrainConfig) -> MaskedImageModel:
    """Build the model of a complete configuration, with the initial weights of its seed."""
    assert config.image_size is not None and isinstance(config.mean, tuple) and isinstance(config.std, tuple)
    keras.config.set_dtype_policy("mixed_bfloat16" if config.precision == "bf16" else "float32")
    architecture = architecture_of(config)
    encoder = _ENCODERS[architecture.family](architecture, config.image_size, config.channels, config.drop_path)
    if config.checkpoint_activations:
        encoder.backbone.recompute = True
    check_sizes(config, encoder)
    outputs = config.target.channels(config.channels, encoder.stride)
    head = create_head(config.head, encoder.num_features, outputs)
    model = MaskedImageModel(encoder, head, config.target, config.loss, mean=config.mean, std=config.std)
    shapes = {weights.torch_name(variable): weights.torch_shape(variable) for variable in model.variables}
    weights.assign(model, first_values(shapes, architecture, config.seed))
    return model
