"""Trains a small ViT for some steps on several devices and on one of them, in one process.

`python devices.py BACKEND N [shard]` prints, as JSON, losses and how far the weights end apart; with `shard`, a second
time for devices that share the state. The batch is drawn once; weights, masks and images are the same.
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

BACKEND, COUNT = sys.argv[1], int(sys.argv[2])
if BACKEND == "jax":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={COUNT}"

import numpy as np  # noqa: E402

from simmim.config.pretraining import PretrainConfig  # noqa: E402
from simmim.keras_engine import use_backend  # noqa: E402

use_backend(BACKEND)

from simmim.keras_engine import weights  # noqa: E402
from simmim.keras_engine.machine import Machine  # noqa: E402
from simmim.keras_engine.model import build_model  # noqa: E402

CONFIG = PretrainConfig(
    data="none",
    out="none",
    model="vit_tiny_patch16_224",
    model_args={"depth": 2, "embed_dim": 48},
    image_size=(64, 64),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    batch_size=2 * COUNT,
    drop_path=0.1,
    precision="fp32",
    compile=True,
)


def machines() -> tuple[Machine, Machine]:
    """One of all devices, and one of the first."""
    if BACKEND == "jax":
        import jax

        from simmim.keras_engine.jax_machine import JaxMachine

        return JaxMachine(jax.devices()), JaxMachine(jax.devices()[:1])
    import tensorflow as tf

    from simmim.keras_engine.tensorflow_machine import TensorFlowMachine

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * COUNT)
    one = TensorFlowMachine(tf.distribute.OneDeviceStrategy("CPU:0"), "cpu", "one")
    return TensorFlowMachine.find("cpu"), one


def train(machine: Machine, config: PretrainConfig) -> tuple[list[list[float]], weights.State, float]:
    """Figures of each step, parameters after them, and the share of the state that the first device holds."""
    with machine.building():
        model = build_model(config)
    stepper = machine.start(model, config)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(5):
        mask = rng.permuted(np.tile(np.arange(4) < 2, (config.batch_size, 1)), axis=1).reshape(-1, 2, 2)
        batch = {
            "image": rng.integers(0, 256, (config.batch_size, 64, 64, 3), dtype=np.uint8),
            "flip": rng.random((config.batch_size, 1)) < 0.5,
            "mask": np.repeat(np.repeat(mask, 2, 1), 2, 2),
            "drop_path": rng.random((config.batch_size, 2), dtype=np.float32),
        }
        rows.append(stepper.step(batch, 1e-3))
    parameters = weights.export(model.trainable_variables, stepper.read().parameters)
    return stepper.fetch(rows), parameters, held(stepper) if BACKEND == "jax" else 1.0


def held(stepper: Any) -> float:
    import jax

    arrays = jax.tree.leaves(stepper._state)
    return sum(array.addressable_data(0).nbytes for array in arrays) / sum(array.nbytes for array in arrays)


def main() -> dict[str, Any]:
    many, one = machines()
    expected, plain, _ = train(one, CONFIG)

    def compare(*, shard: bool) -> dict[str, Any]:
        figures, parameters, share = train(many, replace(CONFIG, shard=shard))
        return {
            "devices": many.devices,
            "share": share,
            "losses": [row[0] for row in figures],
            "apart": float(np.abs(np.array(figures) - np.array(expected)).max()),
            "weights apart": max(float(np.abs(parameters[name] - plain[name]).max()) for name in plain),
        }

    found = {"copied": compare(shard=False)}
    return found | ({"sharded": compare(shard=True)} if "shard" in sys.argv else {})


if __name__ == "__main__":
    print(json.dumps(main()))
