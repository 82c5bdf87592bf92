import os
import tempfile

# Kernels of CPUs are chosen by version 0.1's rules, since a measurement would make results vary.
os.environ["SIMMIM_KERNELS"] = "rules"
os.environ.setdefault("SIMMIM_CACHE", tempfile.mkdtemp(prefix="simmim-cache-"))
