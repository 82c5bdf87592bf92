#!/bin/bash
# What the step does on an NVIDIA GPU, unattended, in under 9 minutes: make bench-gpu, or benchmarks/gpu.sh.
#
# Needs torch, torchvision, timm and transformers in $PYTHON. What else simmim needs is installed from a folder of wheels,
# $WHEELS, without network; fill it on a machine that has one: tools/collect_wheels.sh 3.12 (the GPU machine's Python).
# `--smoke` does the same on the CPU with very small models, to see that it runs.
#
# A part that fails or takes too long does not stop the others. Results: benchmarks/results/*.json, profiles beside them.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
RESULTS=${RESULTS:-benchmarks/results}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} TPU_SKIP_MDS_QUERY=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0
export HF_HUB_OFFLINE=1

if [ -d "$WHEELS" ]; then
    "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" \
        grain tyro pydantic tomli-w rich tensorboardX simplejpeg opencv-python-headless pytest pytest-timeout ||
        echo "some wheels are missing in $WHEELS: see tools/collect_wheels.sh"
fi

failed=0
part() { # SECONDS COMMAND…
    echo "== ${*:2}"
    timeout "$@" || { echo "== ended with $?: ${*:2}"; failed=1; }
}

if [ "$1" = "--smoke" ]; then
    part 120 "$PYTHON" benchmarks/step_vs_peers.py --cases vit swin resnet --device cpu --batch-size 2 --rounds 1 --tiny \
        --no-compile --profile "$RESULTS/profiles_tiny"
else
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    part 120 "$PYTHON" -m pytest -m gpu tests/torch_engine/test_gpu.py -q --timeout=110
    peers() { # SECONDS CASE BATCH
        part "$1" "$PYTHON" benchmarks/step_vs_peers.py --cases "$2" --device cuda --batch-size "$3" --rounds 3 \
            --steps 8 --name "step_vs_peers_cuda_$2" --profile "$RESULTS/profiles"
    }
    peers 140 vit 256
    peers 160 swin 256
    peers 100 resnet 256
fi
exit $failed
