#!/bin/bash
# The wheels that a machine without network needs for benchmarks/gpu.sh, besides torch, torchvision, timm and transformers:
#   tools/collect_wheels.sh 3.12 [FOLDER]      for that Python on Linux x86-64
set -e
version=${1:?"give the Python version of the machine, such as 3.12"}
python3 -m pip download --quiet --only-binary=:all: --python-version "$version" --implementation cp \
    --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --dest "${2:-wheels}" \
    grain tyro pydantic tomli-w rich tensorboardX simplejpeg opencv-python-headless pytest pytest-timeout
