"""Files that start an advised training on a cluster or in a cloud, and start it again: Slurm, SkyPilot, Kubernetes.

Words in capital letters are for the user to replace: what they stand for cannot be known here.
"""

import json
import math
import shlex
from collections.abc import Callable
from typing import Literal

from simmim.advise.request import Option
from simmim.errors import UserError

Launcher = Literal["none", "slurm", "skypilot", "kubernetes"]

_PLACES = "--data IMAGES --out RUN"  # of the command that `simmim advise` shows
_LONGEST = 24  # hours of a Slurm job, after which it is queued again


def launch_file(option: Option, launcher: Launcher) -> str:
    """Return the file that starts an option's training with a launcher.

    Raises `UserError` for an option that trains on no GPU.
    """
    if " --device cuda" not in option.command:
        raise UserError(
            f"--launch {launcher} starts trainings on GPUs, and the first option is {option.title}; name a GPU as "
            "--accelerator, such as h100-sxm (docs/tpu.md starts one on TPUs)"
        )
    return _FILES[launcher](option)


def _slurm(option: Option) -> str:
    hours = min(math.ceil(option.hours[2]) + 1, _LONGEST)
    return f"""\
#!/bin/bash
# {_title(option)}
# Replace IMAGES and RUN by paths that every machine sees, then: sbatch FILE
#SBATCH --job-name=simmim
#SBATCH --nodes=1
#SBATCH --ntasks-per-node={option.devices}
#SBATCH --gres=gpu:{option.devices}
#SBATCH --cpus-per-task={_cores(option)}
#SBATCH --time={hours}:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=simmim-%j.log

# A task for each GPU, without torchrun: exit codes and signals are those of simmim. More --nodes share the batch.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

# --wait: once a task has ended, the others have ten minutes to write the report, or to notice that it is lost.
srun --wait=600 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' task \\
    {_wrapped("simmim " + _arguments(option), "        ")}
code=$?

# 75: the time limit was near, and the run is saved. Slurm itself queues again what it pre-empts or a machine loses.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _skypilot(option: Option) -> str:
    return f"""\
# {_title(option)}
# Replace BUCKET (or s3 by gs, r2, …), IMAGES, and SIMMIM (a checkout of the package), then: sky jobs launch FILE
name: simmim

resources:
  accelerators: {_sky_name(option.accelerator)}:{option.devices}
  cpus: {math.ceil(option.input_cores)}+
  use_spot: true
  job_recovery:
    strategy: FAILOVER
    max_restarts_on_errors: 3

workdir: SIMMIM

# The run outlives the machine: a job that lost its spot machine starts on another, from the newest checkpoint.
file_mounts:
  /runs:
    source: s3://BUCKET
    mode: MOUNT_CACHED

setup: pip install .

run: |
  {_wrapped(_restarted(option).replace(_PLACES, "--data IMAGES --out /runs/RUN"), "    ")}
"""


def _kubernetes(option: Option) -> str:
    command = ["torchrun", "--max-restarts", "3", "-m", "simmim"]
    arguments = shlex.split(_arguments(option).replace(_PLACES, "--data /data/IMAGES --out /data/RUN"))
    gpu = "amd.com/gpu" if option.accelerator.startswith("mi") else "nvidia.com/gpu"
    return f"""\
# {_title(option)}
# Replace IMAGE (a container with simmim), CLAIM (a volume that holds images and runs), IMAGES and RUN, then:
# kubectl create -f FILE. Kubeflow Trainer tells torchrun of the pods; lost pods start again and the run resumes.
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  generateName: simmim-
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: IMAGE
    numNodes: 1
    numProcPerNode: {option.devices}
    command: {json.dumps(command)}
    args: {json.dumps(arguments)}
    resourcesPerNode:
      limits:
        {gpu}: {option.devices}
      requests:
        cpu: {math.ceil(option.input_cores)}
  runtimePatches:
    - manager: simmim/advise
      trainingRuntimeSpec:
        template:
          spec:
            replicatedJobs:
              - name: node
                template:
                  spec:
                    template:
                      spec:
                        volumes:
                          - name: data
                            persistentVolumeClaim:
                              claimName: CLAIM
                          - name: shared-memory
                            emptyDir:
                              medium: Memory
                        containers:
                          - name: node
                            volumeMounts:
                              - name: data
                                mountPath: /data
                              - name: shared-memory
                                mountPath: /dev/shm
"""


_FILES: dict[str, Callable[[Option], str]] = {"slurm": _slurm, "skypilot": _skypilot, "kubernetes": _kubernetes}


def _title(option: Option) -> str:
    low, likely, high = option.hours
    return (
        f"simmim advise: {option.devices} × {option.title}, {likely:.2g} hours ({low:.2g} to {high:.2g}), an estimate "
        "of what was not run"
    )


def _arguments(option: Option) -> str:
    return option.command[option.command.index("pretrain ") :]


def _restarted(option: Option) -> str:
    """Return the command by torchrun, which starts lost processes again, on one device too."""
    return f"torchrun --nproc-per-node {option.devices} --max-restarts 3 -m simmim {_arguments(option)}"


def _wrapped(command: str, indent: str) -> str:
    """Break a shell command before its options."""
    return command.replace(" --", f" \\\n{indent}--")


def _cores(option: Option) -> int:
    return max(2, math.ceil(option.input_cores / option.devices))


def _sky_name(accelerator: str) -> str:
    """Return SkyPilot's name of an accelerator: rtx-4090 → RTX4090, h100-sxm → H100, a100-40gb → A100."""
    for ours, theirs in {"rtx-": "rtx", "h100-sxm": "h100", "a100-40gb": "a100"}.items():
        accelerator = accelerator.replace(ours, theirs)
    return accelerator.upper()
