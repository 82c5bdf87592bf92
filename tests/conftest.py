import os
import tempfile

import pytest

# Kernels of CPUs are chosen by version 0.1's rules, since a measurement would make results vary.
os.environ["SIMMIM_KERNELS"] = "rules"
os.environ.setdefault("SIMMIM_CACHE", tempfile.mkdtemp(prefix="simmim-cache-"))

# The dearest files, which `make test` begins with, so that no worker is left with one when the others are done.
DEAREST = [
    "nullgpu/test_commands.py",
    "torch_engine/test_lower.py",
    "keras_engine/test_parity.py",
    "keras_engine/test_compile_tpu.py",
    "keras_engine/test_pretrain.py",
    "torch_engine/test_cost.py",
    "torch_engine/test_distributed.py",
    "torch_engine/test_detect.py",
    "torch_engine/test_resume.py",
    "keras_engine/test_devices.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {file: place for place, file in enumerate(DEAREST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(DEAREST)))
