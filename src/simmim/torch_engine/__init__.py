"""The PyTorch engine: CPU, NVIDIA GPU, and Google TPU through TorchTPU."""

import glob
import os

# An installed torch_tpu is otherwise loaded by `import torch`, and where there is no TPU it asks a metadata server for
# one, for minutes. `--device tpu` imports it by name. Both settings must stand before torch is first imported.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
