"""The training step as TorchTPU lowers it: the same numbers as eager PyTorch. It runs on XLA's CPU, not on a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_MISSING = [name for name in ("torch_tpu", "libtpu", "jax") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"{', '.join(_MISSING)} not installed: pip install 'simmim[tpu]'"),
    pytest.mark.timeout(900),
]

MODELS = {
    "vit_tiny_patch16_224": ("depth=2", "embed_dim=48"),
    "beit_base_patch16_224": (
        *("depth=2", "embed_dim=48", "num_heads=3"),
        *("use_rel_pos_bias=false", "use_shared_rel_pos_bias=true"),
    ),
    "swin_tiny_patch4_window7_224": ("embed_dim=24", "depths=[1,2]", "num_heads=[2,4]", "window_size=4"),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_lowered_step_equals_an_eager_one(model: str) -> None:
    script = Path(__file__).with_name("lower_and_run.py")
    command = [sys.executable, str(script), model, *MODELS[model]]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["moved"] > 1e-4
    assert found["loss"] < 1e-5
    assert found["gradients"] < 1e-4
    assert found["parameters"] < 1e-5
