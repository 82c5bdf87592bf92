"""The TPU compiler where there is no TPU: a step in StableHLO goes in, the compiler's figures come out. Nothing runs.

libtpu compiles for every TPU on any Linux x86-64 machine, and jaxlib has a client that only compiles. What they say is
what they would do for a real device: how much memory the step takes there and whether it fits. How long it takes they
do not say, and nothing here is a measurement.

`ENVIRONMENT` must be set before a process loads libtpu, so whoever compiles starts a process of its own (`tpu_check`).
"""

# pyright: reportMissingImports=false
# jax comes with the extras [tpu] and [keras], which need not be installed.

import dataclasses
import importlib.metadata
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simmim.errors import UserError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else it asks for minutes for the metadata of a TPU machine
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    # What libtpu asks the metadata for; it compiles for the topology that it is given.
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Its messages, of which those that matter come as errors too.
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# Some that exist, as examples; the compiler knows the others.
TOPOLOGIES = ("v4:2x2x1", "v5e:1x1", "v5e:2x4", "v5p:2x2x1", "v6e:1x1", "v6e:2x4", "tpu7x:2x2x1")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# XLA's effort levels by number. O1 compiles in a third of the time; what it does less well is speed.
EFFORTS = {"O0": 9, "O1": 19, "O2": 29, "O3": 39}
_PACKAGES = ("libtpu", "jaxlib", "torch", "torch_tpu", "keras", "tensorflow_cpu")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """Which step was compiled, and for what."""

    engine: str
    backend: str | None
    model: str
    image_size: tuple[int, int]
    precision: str
    topology: str
    devices: int
    """Devices of the topology, as a program sees them: v4 and tpu7x have two a chip."""
    batch_size: int
    """Images of a step, over all devices."""
    notes: tuple[str, ...] = ()
    """Parts of the training that were not compiled."""

    @property
    def batch_a_device(self) -> int:
        return self.batch_size // self.devices


@dataclass(frozen=True, kw_only=True)
class CompilerReport(StepFacts):
    """The TPU compiler's report on a training step: memory, FLOP and collectives of one device.

    If the step does not fit, these are missing, and `needed` is the compiler's figure.
    """

    fits: bool
    available: int
    """Bytes of HBM that the compiler may use."""
    needed: int | None = None
    """Bytes that the compiler said a step needs that does not fit."""
    hbm: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes: arguments, outputs, aliased (outputs in the place of arguments), temporaries, code, and total of them."""
    flops: float | None = None
    """FLOP of a step, but for those inside kernels."""
    kernels: int | None = None
    """Calls of kernels that the compiler does not look into; `None` where the compiled program cannot be read."""
    collectives: dict[str, int] | None = None
    """By name; `None` as for the kernels."""
    too_large: int | None = None
    """The smallest batch a device that a search found not to fit."""
    seconds: float
    """That the compiler took."""
    versions: dict[str, str]

    @property
    def flops_a_step(self) -> float | None:
        """Of all devices."""
        return None if self.flops is None else self.flops * self.devices

    def as_json(self) -> str:
        more = {"batch_a_device": self.batch_a_device, "flops_a_step": self.flops_a_step}
        return json.dumps(dataclasses.asdict(self) | more, indent=1)


def report_of(compile: Callable[[], Any], facts: StepFacts) -> CompilerReport:
    """Call `compile`, which returns the executable of a step (`jaxlib`'s, as `compile_stablehlo` does), and report.

    A step that does not fit is a report too; whatever else goes wrong is raised as it comes.
    """
    begun = time.perf_counter()
    about = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    about |= {"available": available_hbm(facts.topology), "versions": _versions()}
    try:
        executable = compile()
    except Exception as error:  # XlaRuntimeError, which is in no public place, or Keras's or TensorFlow's own
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - begun
        return CompilerReport(**about, fits=False, needed=sizes(str(error))[0], seconds=seconds)
    seconds = time.perf_counter() - begun
    costs = executable.cost_analysis()
    text = _program(executable)
    return CompilerReport(
        **about,
        fits=True,
        hbm=_memory(executable.get_compiled_memory_stats()),
        flops=(costs[0] if isinstance(costs, list) else costs).get("flops"),
        kernels=None if text is None else text.count('custom_call_target="tpu_custom_call"'),
        collectives=None if text is None else count_collectives(text),
        seconds=seconds,
    )


def count_collectives(text: str) -> dict[str, int]:
    """Count the exchanges between devices in a compiled program's text, by name."""
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


def _program(executable: Any) -> str | None:
    """Return the compiled program as text; `None` if libtpu uses an operation that jaxlib lacks (ViT-B for a v6e)."""
    from jax.errors import JaxRuntimeError

    try:
        return executable.hlo_modules()[0].to_string()
    except JaxRuntimeError:
        return None


def _memory(stats: Any) -> dict[str, int]:
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values()) - 2 * parts["aliased"]}


def sizes(text: str) -> list[int]:
    """Read the amounts of memory in a message of the compiler, such as 15.75G, in bytes and in its order."""
    return [round(float(number) * _UNITS[unit]) for number, unit in re.findall(r"\b(\d+\.\d+)([KMGT]?)\b", text)]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def topology_devices(topology: str) -> list[Any]:
    """Return the devices of a topology such as v5e:2x4. Raises `UserError` for an unknown topology."""
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"topology {topology!r} is not known ({reason}); use one like {', '.join(TOPOLOGIES)}"
        ) from None


def compile_stablehlo(text: str, topology: str, *, effort: str = "O1") -> Any:
    """Compile a StableHLO module for one device of a topology: jaxlib's executable, which cannot run here.

    An argument that the module marks as a donor (`jax.buffer_donor`) gives its memory to an output.
    """
    import numpy as np

    try:  # jax has no public door for StableHLO; these are what `jax.jit` itself goes through
        from jax._src.interpreters.mlir import make_ir_context
        from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]
        from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
    except ImportError as error:
        raise UserError(f"jax has moved what compiles StableHLO ({error}); pip install 'jax>=0.10,<0.11'") from error

    device = topology_devices(topology)[0]
    options = xla_client.CompileOptions()
    options.num_replicas = options.num_partitions = 1
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))
    options.executable_build_options.optimization_level = EFFORTS[effort]
    with make_ir_context() as context:
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(text)
    return device.client.compile(module, xla_client.DeviceList((device,)), options)


def available_hbm(topology: str) -> int:
    """Ask the compiler for far too much, to learn how many bytes of HBM it may use on a device."""
    huge = f"tensor<{2**42}xf32>"
    module = f"func.func public @main(%x: {huge}) -> {huge} {{ %y = stablehlo.add %x, %x : {huge} return %y : {huge} }}"
    try:
        compile_stablehlo(module, topology)
    except Exception as error:  # see `report_of`
        if "RESOURCE_EXHAUSTED" in str(error):
            return sizes(str(error))[1]
        raise
    raise AssertionError("the compiler took 32 TiB")
