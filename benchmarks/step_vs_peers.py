"""Our pretraining step against its peers', in one run on this machine.

    python benchmarks/step_vs_peers.py [--cases vit swin resnet] [--rounds 5] [--batch-size N] [--tiny]
    python benchmarks/step_vs_peers.py --device cuda --cases vit --batch-size 256

The peers: Transformers' `ViTForMaskedImageModeling` and `SwinForMaskedImageModeling`, in fp32 as its example script
runs them and tuned (autocast to bf16, fused attention, fused AdamW, on CUDA compiled too), and the same timm model in
a plain training loop (mask token, linear head, L1 on hidden pixels), eager and compiled. All train on the same images
and masks, from the same weights: forward, backward, clip, AdamW. Rounds alternate on the CPU, and the fastest of each
contender counts: other work on the machine only ever slows a step. The losses of the first step are printed beside the
speeds: they are equal but for precision (of the ResNet not, which ours masks in another place). Figures are saved as
they come.

Our CPU kernels are those that a new run chooses (`simmim bench` prints their times). The last lines name each peer that
our step of the same precision is behind, and the exit status is 1 if there is one. Behind means that the median over
the rounds of the peer's time divided by ours is below 0.97. `--one-thread` compares processor time, for a machine with
other work.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from results import machine, save
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from simmim.config.pretraining import PretrainConfig
from simmim.interop.weight_names import to_transformers
from simmim.method.targets import patchify
from simmim.torch_engine.interop.export import arrays
from simmim.torch_engine.models.family import find_family
from simmim.torch_engine.perf.kernel_choice import choose_kernels
from simmim.torch_engine.perf.trial import build_update, random_batch
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.storage import build_step

Step = Callable[[], Tensor]
CASES = {
    "vit": ("vit_base_patch16_224", 224, {}),
    "swin": ("swin_base_patch4_window7_224", 192, {"window_size": 6}),
    "resnet": ("resnet50", 224, {}),
}
TINY = {
    "vit": (64, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "swin": (64, {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 2}),
    "resnet": (64, {"channels": (8, 16, 32, 64)}),
}


def settings(case: str, batch: int, device: str, *, tiny: bool) -> PretrainConfig:
    model, size, arguments = CASES[case]
    if tiny:
        size, arguments = TINY[case]
    return PretrainConfig(
        model=model,
        model_args=arguments,
        image_size=(size, size),
        batch_size=batch,
        device=device,  # type: ignore[arg-type]
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


# Our step and the peers that do the same in the same precision.
MATCHES = {
    "simmim fp32": ("transformers fp32", "timm fp32"),
    "simmim bf16": ("transformers tuned", "timm bf16"),
    "simmim bf16 compiled": ("timm bf16 compiled",),
}
MARGIN = 0.97  # alike steps differ by so much in a few rounds


def ours(config: PretrainConfig, **changes: Any) -> Step:
    config = dataclasses.replace(config, **changes)
    config = dataclasses.replace(config, kernels=choose_kernels(config, int))
    step, update = build_update(config, World(device=torch.device(config.device)))
    batch = random_batch(config, config.batch_size, step)
    return lambda: update(0, batch)[1][0]


class Peer(nn.Module):
    """The images and masks of `ours`, and a peer's loss of them from the same weights, which `self.start` has."""

    def __init__(self, config: PretrainConfig, patch: int):
        super().__init__()
        torch.manual_seed(0)  # as `build_update` does
        step = build_step(config)
        self.start = [step.model]  # in a list: no part of the peer
        batch = random_batch(config, config.batch_size, step)
        images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        self.images = torch.where(torch.from_numpy(batch["flip"]).view(-1, 1, 1, 1), images.flip(3), images)
        self.images = self.images.contiguous().to(config.device)
        self.mask = torch.from_numpy(batch["mask"]).to(config.device)  # (B, H/p, W/p)


class TransformersPeer(Peer):
    def __init__(self, config: PretrainConfig, case: str, *, attention: str | None):
        super().__init__(config, 16 if case == "vit" else 4)
        from transformers import SwinConfig, SwinForMaskedImageModeling, ViTConfig, ViTForMaskedImageModeling
        from transformers.utils import logging as transformers_logging

        assert config.image_size is not None
        args, size = config.model_args, config.image_size[0]
        chosen: dict[str, Any] = {"image_size": size} | ({"attn_implementation": attention} if attention else {})
        if case == "vit":
            small: dict[str, Any] = {
                "hidden_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "intermediate_size": 192,
            }
            kind: Any = ViTForMaskedImageModeling
            theirs: Any = ViTConfig(
                encoder_stride=16, layer_norm_eps=1e-6, **chosen, **(small if "depth" in args else {})
            )
        else:
            kind = SwinForMaskedImageModeling
            theirs = SwinConfig(
                embed_dim=args.get("embed_dim", 128),
                depths=args.get("depths", (2, 2, 18, 2)),
                num_heads=args.get("num_heads", (4, 8, 16, 32)),
                window_size=args["window_size"],
                drop_path_rate=0.0,
                encoder_stride=32,
                **chosen,
            )
        transformers_logging.disable_progress_bar()
        weights = to_transformers(arrays(self.start.pop()), case)
        state = {name: torch.from_numpy(array) for name, array in weights.items()}
        self.model: Any = kind.from_pretrained(None, config=theirs, state_dict=state)

    def forward(self) -> Tensor:
        return self.model(self.images, bool_masked_pos=self.mask.flatten(1)).loss


class TimmPeer(Peer):
    """timm's model as one would write it without a package: everything computed, masked in the loss."""

    def __init__(self, config: PretrainConfig, case: str):
        super().__init__(config, {"vit": 16, "swin": 4, "resnet": 16}[case])
        family = find_family(config.model)
        arguments: dict[str, Any] = {**dict(family.arguments), "drop_path_rate": 0.0, **config.model_args}
        if family.takes_image_size:
            arguments["img_size"] = config.image_size
        self.model: Any = timm.create_model(config.model, num_classes=0, **arguments)
        self.case, self.stride = case, 16 if case == "vit" else 32
        width = 3 if case == "resnet" else self.model.patch_embed.proj.out_channels
        self.token = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(self.model.num_features, 3 * self.stride**2)
        start = self.start.pop()
        self.model.load_state_dict(start.encoder.backbone.state_dict())
        self.head.load_state_dict(start.head.state_dict())
        if case != "resnet":
            self.token.data = start.encoder.mask_token.data.flatten()
            self.model.patch_embed.register_forward_hook(self._put_token)

    def _put_token(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        mask = self.mask.flatten(1) if output.ndim == 3 else self.mask
        return torch.where(mask.unsqueeze(-1), self.token.to(output.dtype), output)

    def forward(self) -> Tensor:
        patch = self.images.shape[2] // self.mask.shape[1]
        pixels = self.mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1)  # (B, 1, H, W)
        images = self.images
        if self.case == "resnet":
            images = torch.where(pixels, self.token.view(1, 3, 1, 1), images)
        features = self.model.forward_features(images)
        if self.case == "vit":
            features = features[:, self.model.num_prefix_tokens :].unflatten(1, (self.mask.shape[1], -1))
        elif self.case == "resnet":
            features = features.permute(0, 2, 3, 1)
        prediction = self.head(features).float()
        target = patchify(torch, self.images.permute(0, 2, 3, 1), self.stride)
        weight = patchify(torch, pixels.float().permute(0, 2, 3, 1).expand(-1, -1, -1, 3), self.stride)
        return ((prediction - target).abs() * weight).sum() / (weight.sum() + 1e-5)


def peer(model: Peer, config: PretrainConfig, *, bf16: bool, compiled: bool = False) -> Step:
    device = config.device
    model.to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05, fused=True if bf16 or compiled else None)
    if compiled:
        model.compile(dynamic=False)

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def contenders(config: PretrainConfig, case: str, *, compiled: bool) -> dict[str, Callable[[], Step]]:
    cuda = config.device == "cuda"
    found: dict[str, Callable[[], Step]] = {}
    if case != "resnet":
        # Transformers' Swin has no fused attention in every release; then it is tuned without.
        attention = "sdpa" if case == "vit" else None
        found["transformers fp32"] = lambda: peer(TransformersPeer(config, case, attention=None), config, bf16=False)
        found["transformers tuned"] = lambda: peer(
            TransformersPeer(config, case, attention=attention), config, bf16=True, compiled=cuda and compiled
        )
    found["timm fp32"] = lambda: peer(TimmPeer(config, case), config, bf16=False)
    found["timm bf16"] = lambda: peer(TimmPeer(config, case), config, bf16=True)
    found["simmim fp32"] = lambda: ours(config, precision="fp32", compile=False)
    found["simmim bf16"] = lambda: ours(config, precision="bf16", compile=False)
    if compiled:
        found["timm bf16 compiled"] = lambda: peer(TimmPeer(config, case), config, bf16=True, compiled=True)
        found["simmim bf16 compiled"] = lambda: ours(config, precision="bf16", compile=True)
    return found


def measure(
    starts: dict[str, Callable[[], Step]], device: str, *, rounds: int, steps: int, clock: Callable[[], float]
) -> Iterator[dict[str, dict[str, Any]]]:
    """Seconds a step of each contender, as far as known. One that cannot run says why, and the others go on."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    running: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, start in starts.items():
        try:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            step = start()
            rows[name] = {"first_loss": float(step())}
            step()  # the optimiser's averages are there from now on
            wait()
            rows[name]["warm_up_seconds"] = time.perf_counter() - begun
            if device == "cuda":
                rows[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        except Exception as error:  # out of memory, or a compiler's: the finding
            rows[name] = {"error": " ".join(str(error).split())[:300]}
            continue
        if device == "cuda":  # one at a time: together they would not fit
            rows[name]["seconds"] = [timed(step, steps, wait, clock) for _ in range(rounds)]
            del step
            torch.cuda.empty_cache()
            yield rows
        else:
            running[name] = step
            rows[name]["seconds"] = []
    for _ in range(rounds):
        for name, step in running.items():
            rows[name]["seconds"].append(timed(step, steps, wait, clock))
        yield rows


def timed(step: Step, steps: int, wait: Callable[[], None], clock: Callable[[], float]) -> float:
    begun = clock()
    for _ in range(steps):
        step()
    wait()
    return (clock() - begun) / steps


def report(title: str, rows: dict[str, dict[str, Any]], batch: int) -> None:
    base = next((row for row in rows.values() if "seconds" in row), None)  # the first contender that runs
    print(f"{title}\n  {'step':24}{'images/s':>10}{'ratio':>8}{'first loss':>12}")
    for name, row in rows.items():
        if "error" in row:
            print(f"  {name:24} does not run: {row['error'][:80]}")
            continue
        assert base is not None
        row["images_per_second"] = batch / min(row["seconds"])
        row["ratio"] = min(base["seconds"]) / min(row["seconds"])
        print(f"  {name:24}{row['images_per_second']:10.2f}{row['ratio']:8.2f}{row['first_loss']:12.4f}", flush=True)


def compare_with_peers(rows: dict[str, dict[str, Any]], device: str, *, compiled: bool) -> dict[str, float]:
    """Return our speed relative to each peer, by "ours / peer": the median over the rounds."""
    matches = dict(MATCHES)
    if device == "cuda" and compiled:  # there the tuned peer is compiled
        matches["simmim bf16"] = ("timm bf16",)
        matches["simmim bf16 compiled"] = ("timm bf16 compiled", "transformers tuned")
    return {
        f"{mine} / {peer}": statistics.median(
            theirs / own for own, theirs in zip(rows[mine]["seconds"], rows[peer]["seconds"], strict=True)
        )
        for mine, peers in matches.items()
        for peer in peers
        if rows.get(mine, {}).get("seconds") and rows.get(peer, {}).get("seconds")
    }


def profile_ours(config: PretrainConfig, path: Path, *, compiled: bool) -> None:
    """A table of the operations that take most of three steps of ours in bf16."""
    step = ours(config, precision="bf16", compile=compiled)
    step()
    step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (config.device == "cuda")
    with profile(activities=kinds) as profiler:
        for _ in range(3):
            step().item()
    order = f"self_{config.device}_time_total"
    path.write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80))
    print(f"wrote {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["vit", "swin"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of a round (on a GPU: 10 or so)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what is compiled")
    parser.add_argument("--one-thread", action="store_true", help="one thread, and processor time (CPU only)")
    parser.add_argument("--only", nargs="+", help="these contenders only, by name")
    parser.add_argument("--profile", type=Path, help="write what our step's time goes into to files in this folder")
    parser.add_argument("--tiny", action="store_true", help="very small models, to see that this runs")
    parser.add_argument("--name", help="of the file in benchmarks/results (default: step_vs_peers_DEVICE)")
    arguments = parser.parse_args()
    clock = time.perf_counter
    if arguments.one_thread:
        torch.set_num_threads(1)
        clock = time.thread_time
    figures: dict[str, Any] = {}
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    name = arguments.name or f"step_vs_peers_{arguments.device}{'_tiny' if arguments.tiny else ''}"
    facts = {**machine(), "gpu": gpu, "threads": torch.get_num_threads(), "cases": figures}
    for case in arguments.cases:
        config = settings(case, arguments.batch_size, arguments.device, tiny=arguments.tiny)
        starts = contenders(config, case, compiled=arguments.compile)
        starts = {name: start for name, start in starts.items() if not arguments.only or name in arguments.only}
        title = f"{config.model} at {config.image_size}, batch {config.batch_size}, {arguments.device}"
        figures[case] = {"what": title, "load_before": os.getloadavg()[0]}
        for rows in measure(starts, arguments.device, rounds=arguments.rounds, steps=arguments.steps, clock=clock):
            figures[case]["contenders"] = rows
            save(name, facts, quiet=True)
        rows = figures[case]["contenders"]
        report(title, rows, config.batch_size)
        figures[case]["relative"] = compare_with_peers(rows, arguments.device, compiled=arguments.compile)
        save(name, facts)
        if arguments.profile:
            arguments.profile.mkdir(parents=True, exist_ok=True)
            profile_ours(config, arguments.profile / f"step_{case}_{arguments.device}.txt", compiled=arguments.compile)
        torch.compiler.reset()
    behind = [
        f"BEHIND A PEER  {case}: {pair} is {ratio:.2f}"
        for case, found in figures.items()
        for pair, ratio in found["relative"].items()
        if ratio < MARGIN
    ]
    print("\n".join(behind) or "ours is behind no peer")
    return int(bool(behind) and not arguments.tiny)  # very small models say nothing of speed


if __name__ == "__main__":
    sys.exit(main())
