"""Say how a pretraining that ran out of memory fits the device."""

import dataclasses

from simmim.config.pretraining import PretrainConfig
from simmim.hardware.accelerators import read_facts
from simmim.torch_engine.accelerators import describe_device, find_accelerator
from simmim.torch_engine.perf.cost import measure_work
from simmim.torch_engine.train.distributed import World


def explain_out_of_memory(config: PretrainConfig, world: World) -> str | None:
    """Return one line: what the step needs, what the device has, and the option by which it fits.

    `config` is complete. Memory is counted as `simmim advise` does. `None` for a device that does not tell how much it
    has.
    """
    total = find_accelerator(world.device).total_memory
    if total is None:
        return None
    has = total(world.device) / 2**30
    usable = read_facts().usable_gib(has)
    share = config.batch_size // world.size
    needs, ways = 0.0, []
    for checkpoint in dict.fromkeys((config.checkpoint_activations, True)):
        work = measure_work(dataclasses.replace(config, checkpoint_activations=checkpoint, compile=False))
        for pieces in (each for each in range(config.pieces, share + 1) if share % each == 0):
            kept = pieces > 1 or (world.size > 1 and not config.shard)
            images, shards = share // pieces, world.size if config.shard else 1
            memory = work.peak_bytes(images, kept_gradients=kept, shards=shards) / 2**30
            needs = needs or memory
            # What was tried did not fit, whatever is counted of it.
            tried = pieces == config.pieces and checkpoint == config.checkpoint_activations
            if memory <= usable and not tried:
                options = [f"--accumulate-steps {pieces}"] if pieces != config.pieces else []
                options += ["--checkpoint-activations"] * (checkpoint and not config.checkpoint_activations)
                ways.append(f"{' '.join(options)} ({images} images at a time, {memory:.1f} GiB)")
                break
    name = describe_device(world.device)
    start = f"out of memory: the step needs about {needs:.1f} GiB of the {has:.1f} GiB of {name}"
    if not ways:
        return f"{start}; one image is too much: use a smaller --model or --image-size, or more devices with --shard"
    return f"{start}; use {' or '.join(ways)}, or a smaller --batch-size"
