"""Residual convolutional nets (arXiv 1512.03385) that take a mask, after A2MIM (arXiv 2205.13943).

Shapes: `B` images, `H W` pixels, `h w` cells, `D` channels of a stage.
"""

from simmim.keras_engine.architectures import Architecture
from simmim.keras_engine.encoders import BACKBONE, Encoder, drop_path_rates
from simmim.keras_engine.layers import Array, DropPath, DropPaths, Module, convolution, ops

_STAGE = 2  # index of the stage whose hidden cells become the mask token
_MOMENTUM = 0.1  # weight of the newest batch in the running statistics
_EPSILON = 1e-5


class ConvEncoder(Encoder):
    """Set hidden pixels to the mean colour, and replace hidden cells of the third stage's output by the mask token.

    The PyTorch engine's `ConvEncoder` gives the reasons.
    """

    patch_size = 16
    stride = 32

    def __init__(self, architecture: Architecture, image_size: tuple[int, int], channels: int, drop_path: float):
        widths = architecture.arguments["channels"]
        expansion = 4 if architecture.bottleneck else 1
        super().__init__(widths[_STAGE] * expansion)
        self.num_features = widths[-1] * expansion
        self.backbone = _Stages(architecture, channels, drop_path, self.drop_paths)

    def call(self, images: Array, hidden: Array, draws: Array | None = None, training: bool = False) -> Array:
        pixels = ops.repeat(ops.repeat(hidden, self.patch_size, axis=1), self.patch_size, axis=2)
        x = self.backbone.stem(ops.where(pixels[..., None], 0.0, images), training)
        for index, stage in enumerate(self.backbone.stages):
            for block in stage:
                x = block(x, draws if training else None, training=training)
            if index == _STAGE:
                x = self.hide(x, hidden)
        return x


class BatchNorm(Module):
    """PyTorch's batch norm, with unbiased running variance."""

    def __init__(self, name: str, features: int):
        super().__init__(name)
        self.gamma = self.weight("gamma", (features,))
        self.beta = self.weight("beta", (features,))
        self.moving_mean = self.weight("moving_mean", (features,), trainable=False)
        self.moving_variance = self.weight("moving_variance", (features,), trainable=False)

    def call(self, x: Array, training: bool) -> Array:
        x = ops.cast(x, "float32")
        mean, variance = self.moving_mean, self.moving_variance
        if training:
            count = ops.cast(ops.size(x) // x.shape[-1], "float32")
            mean, variance = ops.mean(x, axis=(0, 1, 2)), ops.var(x, axis=(0, 1, 2))
            unbiased = variance * (count / (count - 1))
            self.moving_mean.assign((1 - _MOMENTUM) * self.moving_mean + _MOMENTUM * mean)
            self.moving_variance.assign((1 - _MOMENTUM) * self.moving_variance + _MOMENTUM * unbiased)
        return (x - mean) * (self.gamma * ops.rsqrt(variance + _EPSILON)) + self.beta


class _Stages(Module):
    """Layers under timm's names; the encoder calls them."""

    def __init__(self, architecture: Architecture, channels: int, drop_path: float, drop_paths: DropPaths):
        super().__init__(BACKBONE)
        arguments = architecture.arguments
        self.conv1 = convolution(f"{BACKBONE}.conv1", channels, 64, 7, stride=2)
        self.bn1 = BatchNorm(f"{BACKBONE}.bn1", 64)
        rates = iter(drop_path_rates(drop_path, sum(arguments["layers"])))
        expansion = 4 if architecture.bottleneck else 1
        inputs = 64
        self.stages = []
        for stage, (width, depth) in enumerate(zip(arguments["channels"], arguments["layers"], strict=True)):
            blocks = []
            for index in range(depth):
                name = f"{BACKBONE}.layer{stage + 1}.{index}"
                stride = 2 if stage and not index else 1
                drop = drop_paths.next(next(rates))
                blocks.append(ResidualBlock(name, inputs, width, stride, drop, bottleneck=architecture.bottleneck))
                inputs = width * expansion
            self.stages.append(blocks)

    def stem(self, images: Array, training: bool) -> Array:
        """Shrink images to a quarter: (B, H, W, C) → (B, H/4, W/4, 64)."""
        x = ops.relu(self.bn1(self.conv1(_pad(images, 3)), training=training))
        return ops.max_pool(_pad(x, 1), 3, strides=2, padding="valid", data_format="channels_last")  # x ≥ 0


class ResidualBlock(Module):
    """Two convolutions of 3, or a bottleneck of 1, 3 and 1: (B, h, w, D) → (B, h/stride, w/stride, …)."""

    def __init__(
        self, name: str, inputs: int, width: int, stride: int, drop_path: DropPath | None, *, bottleneck: bool
    ):
        super().__init__(name)
        outputs = 4 * width if bottleneck else width
        sizes = (
            [(1, inputs, width, 1), (3, width, width, stride), (1, width, outputs, 1)]
            if bottleneck
            else [(3, inputs, width, stride), (3, width, width, 1)]
        )
        self.steps = [
            (size, convolution(f"{name}.conv{i}", into, out, size, stride=by), BatchNorm(f"{name}.bn{i}", out))
            for i, (size, into, out, by) in enumerate(sizes, 1)
        ]
        self.drop_path = drop_path
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = (
                convolution(f"{name}.downsample.0", inputs, outputs, 1, stride=stride),
                BatchNorm(f"{name}.downsample.1", outputs),
            )

    def call(self, x: Array, draws: Array | None, training: bool) -> Array:
        branch = x
        for index, (size, conv, norm) in enumerate(self.steps):
            branch = norm(conv(_pad(branch, size // 2)), training=training)
            if index < len(self.steps) - 1:
                branch = ops.relu(branch)
        if self.drop_path is not None and draws is not None:
            branch = self.drop_path(branch, draws)
        if self.shortcut is not None:
            conv, norm = self.shortcut
            x = norm(conv(x), training=training)
        return ops.relu(branch + x)


def _pad(x: Array, n: int) -> Array:
    """Pad each map with zeros."""
    return ops.pad(x, ((0, 0), (n, n), (n, n), (0, 0))) if n else x
