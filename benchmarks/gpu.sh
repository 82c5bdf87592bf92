#!/bin/bash
# What the step does on an NVIDIA GPU, unattended, in under 9 minutes: make bench-gpu, or benchmarks/gpu.sh.
#
# Needs torch, torchvision, timm and transformers in $PYTHON. What else simmim needs is installed from a folder of wheels,
# $WHEELS, without network; fill it on a machine that has one: tools/collect_wheels.sh 3.12 (the GPU machine's Python).
# `--smoke` does the same on the CPU with very small models, to see that it runs.
#
# A part that fails or takes too long does not stop the others; together they end after LIMIT. Results:
# benchmarks/results/*.json, profiles beside them.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
RESULTS=${RESULTS:-benchmarks/results}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} TPU_SKIP_MDS_QUERY=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0
export HF_HUB_OFFLINE=1

LIMIT=530 # seconds for everything
if [ -d "$WHEELS" ]; then
    timeout 40 "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" \
        grain tyro pydantic tomli-w rich tensorboardX simplejpeg opencv-python-headless pytest pytest-timeout ||
        echo "some wheels are missing in $WHEELS: see tools/collect_wheels.sh"
fi

failed=0
part() { # SECONDS COMMAND…: no longer than that, nor than what is left of LIMIT
    local left=$((LIMIT - SECONDS))
    echo "== ${*:2}"
    if [ $left -lt 10 ]; then
        echo "== no time left"
        failed=1
        return
    fi
    timeout --kill-after=5 $(($1 < left ? $1 : left)) "${@:2}" || { echo "== ended with $?: ${*:2}"; failed=1; }
}

if [ "$1" = "--smoke" ]; then
    part 120 "$PYTHON" benchmarks/step_vs_peers.py --cases vit swin resnet --device cpu --batch-size 2 --rounds 1 --tiny \
        --no-compile --profile "$RESULTS/profiles_tiny"
    part 120 "$PYTHON" benchmarks/end_to_end.py --photos demo --cases vit_tiny --forms files --rounds 1 --seconds 0.1 \
        --device cpu --name end_to_end_tiny
    part 60 "$PYTHON" benchmarks/gpu_decode.py --device cpu --batch-size 8 --rounds 1 --seconds 0.1
    part 90 "$PYTHON" benchmarks/gpu_choices.py --device cpu --tiny --eager --batch-size 2 --name gpu_choices_tiny
else
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    part 80 "$PYTHON" -m pytest -m gpu tests/torch_engine/test_gpu.py -q --timeout=80
    peers() { # SECONDS CASE BATCH
        part "$1" "$PYTHON" benchmarks/step_vs_peers.py --cases "$2" --device cuda --batch-size "$3" --rounds 2 \
            --steps 6 --name "step_vs_peers_cuda_$2" --profile "$RESULTS/profiles"
    }
    peers 90 vit 256
    # Attention, memory format, CUDA graphs, batches, one at a time; the most promising first.
    part 135 "$PYTHON" benchmarks/gpu_choices.py --seconds 110
    peers 95 swin 256
    # PHOTOS is a folder of JPEG files; without one the emoji in the package are read.
    part 60 "$PYTHON" benchmarks/end_to_end.py --photos "${PHOTOS:-demo}" --cases vit_base --forms files --rounds 1 \
        --device cuda
    peers 45 resnet 256
    part 25 "$PYTHON" benchmarks/gpu_decode.py --device cuda ${PHOTOS:+--photos "$PHOTOS"}
fi
exit $failed
