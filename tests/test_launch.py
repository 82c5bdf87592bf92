"""Files that `simmim advise --launch` prints: parsed by what reads them, as far as a machine without cluster can."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmim.advise.launch import Launcher, launch_file
from simmim.advise.request import Option
from simmim.cli import main
from simmim.errors import UserError

ARGUMENTS = (
    "pretrain --data IMAGES --out RUN --model vit_base_patch16_224 --model-args 'depth=4' --image-size 224 "
    "--objective pixels --epochs 100 --batch-size 2048 --precision bf16 --device cuda"
)
OPTION = Option(
    accelerator="h100-sxm",
    title="NVIDIA H100 SXM",
    devices=8,
    images_at_a_time=256,
    accumulate_steps=1,
    precision="bf16",
    checkpoint_activations=False,
    shard=False,
    memory_gib=20.0,
    memory_share=0.25,
    images_per_second=20000.0,
    hours=(5.0, 6.0, 9.2),
    usd=None,
    limit="arithmetic",
    input_cores=41.5,
    price="",
    command=f"torchrun --nproc-per-node 8 -m simmim {ARGUMENTS}",
)


def read(launcher: Launcher, **changes: Any) -> Any:
    return yaml.safe_load(launch_file(dataclasses.replace(OPTION, **changes), launcher))


def test_the_slurm_file_is_bash_and_asks_for_a_task_for_each_gpu() -> None:
    text = launch_file(OPTION, "slurm")
    subprocess.run(["bash", "-n"], input=text.encode(), check=True)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == "8" and asked["gres"] == "gpu:8" and asked["cpus-per-task"] == "6"
    assert asked["time"] == "11:00:00" and asked["signal"] == "USR1@300" and "requeue" in asked
    assert "--time=24:00:00" in launch_file(dataclasses.replace(OPTION, hours=(30.0, 40.0, 64.0)), "slurm")


# What the script calls, in place of Slurm: srun starts tasks one after the other, each of which says what it is told.
SLURM = """
srun() { shift; for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@"; done; return %d; }
scontrol() { if [ "$1" = requeue ]; then echo "requeue $2"; else printf 'first\\nsecond\\n'; fi; }
export SLURM_JOB_ID=12345 SLURM_JOB_NODELIST='[first,second]' SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1
"""
SIMMIM = '#!/bin/bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" "$@"\n'


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_slurm_file_starts_ranks_and_queues_again_what_ran_out_of_time(tmp_path: Path, code: int) -> None:
    (tmp_path / "simmim").write_text(SIMMIM)
    (tmp_path / "simmim").chmod(0o755)
    script = f"PATH={tmp_path}:$PATH" + SLURM % code + launch_file(OPTION, "slurm")
    found = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=False)
    words = " ".join(shlex.split(ARGUMENTS))
    assert found.returncode == code and not found.stderr
    assert found.stdout.splitlines() == [
        f"0 0 2 1 first 22345 {words}",
        f"1 1 2 1 first 22345 {words}",
        *(["requeue 12345"] if code == 75 else []),
    ]


def test_the_skypilot_file_recovers_on_spot_machines_and_keeps_the_run() -> None:
    task = read("skypilot")
    assert task["resources"]["accelerators"] == "H100:8" and task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"] == {"strategy": "FAILOVER", "max_restarts_on_errors": 3}
    words = shlex.split(task["run"].replace("\\\n", ""))
    start = ["torchrun", "--nproc-per-node", "8", "--max-restarts", "3", "-m", "simmim"]
    assert words == start + shlex.split(ARGUMENTS.replace("--out RUN", "--out /runs/RUN"))
    assert set(task["file_mounts"]) == {"/runs"}


@pytest.mark.parametrize(
    ("ours", "theirs"), [("rtx-4090", "RTX4090"), ("a100-40gb", "A100"), ("a100-80gb", "A100-80GB"), ("l4", "L4")]
)
def test_accelerators_have_skypilots_names(ours: str, theirs: str) -> None:
    assert read("skypilot", accelerator=ours)["resources"]["accelerators"] == f"{theirs}:8"


def test_the_kubernetes_file_is_a_trainjob_with_the_command() -> None:
    job = read("kubernetes")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == 8 and trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 8}
    assert trainer["command"] == ["torchrun", "--max-restarts", "3", "-m", "simmim"]
    places = ARGUMENTS.replace("IMAGES", "/data/IMAGES").replace("RUN", "/data/RUN")
    assert trainer["args"] == shlex.split(places)
    [patch] = job["spec"]["runtimePatches"]
    [replicated] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }
    limits = read("kubernetes", accelerator="mi300x")["spec"]["trainer"]["resourcesPerNode"]["limits"]
    assert limits == {"amd.com/gpu": 8}


def test_one_gpu_is_started_in_the_same_way() -> None:
    alone = {"devices": 1, "command": f"simmim {ARGUMENTS}"}
    assert "--ntasks-per-node=1\n" in launch_file(dataclasses.replace(OPTION, **alone), "slurm")
    assert read("skypilot", **alone)["run"].startswith("torchrun")
    assert read("kubernetes", **alone)["spec"]["trainer"]["numProcPerNode"] == 1


def test_tpus_are_refused() -> None:
    option = dataclasses.replace(OPTION, title="TPU v5e", command=OPTION.command.replace("cuda", "tpu"))
    with pytest.raises(UserError, match=r"^--launch slurm starts trainings on GPUs, and the first option is TPU v5e; "):
        launch_file(option, "slurm")


def test_the_command_prints_the_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = "advise --model vit_tiny_patch16_224 --model-args depth=1 embed_dim=24 num_heads=1 --images 1000"
    words += " --accelerator rtx-3060 --devices 1 --launch"
    assert main([*words.split(), "slurm"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n# simmim advise: 1 × NVIDIA GeForce RTX 3060 12 GB, ")
    assert main([*words.split(), "skypilot", "--json"]) == 2
    said = capsys.readouterr().err
    assert said == "simmim: --json prints one object, and --launch skypilot a file; use one of them\n"
