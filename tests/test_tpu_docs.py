"""The launch lines of docs/tpu.md start what they say, with stand-ins for a TPU machine's metadata and for torchrun."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"<!-- launch -->\n```bash\n(.*?)```",
    (Path(__file__).parents[1] / "docs" / "tpu.md").read_text(encoding="utf-8"),
    re.DOTALL,
)
CURL = """case "$4" in
*/worker-network-endpoints) printf 'unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2' ;;
*/agent-worker-number) printf 1 ;;
esac
"""
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torch_tpu") is None, reason="TorchTPU is not installed: simmim[tpu]"),
    pytest.mark.slow,
]


def launch(block: str, tmp_path: Path, **environment: str) -> tuple[dict[str, str], list[str]]:
    """The environment and the arguments with which the block starts torchrun."""
    programs = {
        "curl": CURL,
        "torchrun": f'env > {tmp_path}/environment; printf "%s\\n" "$@" > {tmp_path}/arguments',
        "python": f'exec {sys.executable} "$@"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    environment |= {"TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        ["bash", "-e"], input=block, env=os.environ | environment, text=True, timeout=300, check=False
    )
    assert done.returncode == 0
    lines = (tmp_path / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line), (tmp_path / "arguments").read_text().splitlines()


def test_one_host_starts_a_process_for_each_address(tmp_path: Path) -> None:
    addresses = ",".join(f"localhost:{port}" for port in range(8000, 8008))  # which TorchTPU would find itself
    told = {"TORCH_TPU_SLICEBUILDER_ADDRESSES": addresses, "TORCH_TPU_TOPOLOGY": "2,4,1"}
    environment, arguments = launch(BLOCKS[0], tmp_path, **told)
    assert {name: environment[name] for name in told} == told
    assert environment["WORLD_SIZE"] == "8"
    assert arguments[:4] == ["--nproc-per-node", "8", "-m", "simmim"]


def test_a_host_of_a_slice_knows_all_addresses_and_its_own_number(tmp_path: Path) -> None:
    environment, arguments = launch(BLOCKS[1], tmp_path)
    hosts = [address.split(":")[0] for address in environment["TORCH_TPU_SLICEBUILDER_ADDRESSES"].split(",")]
    assert hosts == ["10.0.0.1"] * 4 + ["10.0.0.2"] * 4
    assert environment["TORCH_TPU_TOPOLOGY"] == "4,4,1"
    whole = "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500"
    assert arguments[:13] == [*whole.split(), "--nproc-per-node", "4", "-m", "simmim", "pretrain"]
