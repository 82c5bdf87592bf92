"""Compiles the training step for TPUs that are not here: `python compile_tpu.py TOPOLOGY MODEL BATCH [shard]`.

Prints what the compiler says, as JSON: bytes a chip of arguments and in all, FLOPs a chip, collectives.
"""

import json
import re
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from simmim.config import PretrainConfig
from simmim.keras_engine import use_backend

use_backend("jax")

from simmim.keras_engine.jax_machine import JaxMachine, JaxStepper  # noqa: E402
from simmim.keras_engine.model import build_model  # noqa: E402

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


def main(topology: str, model: str, batch: int, *, shard: bool) -> dict[str, Any]:
    config = PretrainConfig(
        data="none",
        out="none",
        model=model,
        image_size=(224, 224),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        batch_size=batch,
        precision="bf16",
        shard=shard,
    )
    machine = JaxMachine(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    with machine.building():
        built = build_model(config)
    cells = 224 // built.encoder.patch_size
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, 224, 224, 3), np.uint8),
        "flip": jax.ShapeDtypeStruct((batch,), np.bool_),
        "mask": jax.ShapeDtypeStruct((batch, cells, cells), np.bool_),
    }
    compiled = JaxStepper(built, config, machine).lower(shapes).compile()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "device": machine.device,
        "devices": machine.devices,
        "arguments": memory.argument_size_in_bytes,
        "hbm": used + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        "flops": compiled.cost_analysis()["flops"],
        "collectives": {name: len(re.findall(rf" {name}(-start)?\(", text)) for name in COLLECTIVES},
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), shard="shard" in sys.argv)))
