"""Build libcuda.so.1, the GPU that computes nothing, for the torch of this environment: `python build.py FOLDER`."""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# What other libraries of CUDA PyTorch calls, and what of them is work to be counted.
LIBRARIES = r"(?:__)?(?:cuda|cublas|cudnn|curand|nccl|cufft|cusparse|cusolver|nvjpeg|cu[A-Z])\w+"
WORK = re.compile(
    r"cublas\w*(gemm|matmul$|gemv|dot)|cudnn(conv\w*(forward|backward)|batchnorm\w*(ex|training)$|backendexecute)"
    r"|nccl(all|reduce|broad|send|recv)",
    re.IGNORECASE,
)
NO_WORK = re.compile("Get|Find|Desc")
CREATES = re.compile(r"^(?!cuda)\w*Create\w*$|^ncclCommInit\w*$")


def build(folder: Path) -> Path:
    """Compile into the folder and return the library.

    Raises:
        subprocess.CalledProcessError: gcc or nm failed; what they said is its `stderr`.
        FileNotFoundError: gcc or nm is not installed, or torch has no CUDA.
    """
    import torch

    site = Path(torch.__file__).parents[1]
    headers = include_folders(site)
    if torch.version.cuda is None or not headers:
        raise FileNotFoundError(f"torch {torch.__version__} has no CUDA")
    stubs = folder / "stubs.c"
    stubs.write_text("\n".join(stub_lines(site, headers[0] / "cuda.h")) + "\n")
    library = folder / "libcuda.so.1"
    sources = [HERE / "nullgpu.c", stubs]
    flags = ["-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *(f"-I{each}" for each in headers)]
    subprocess.run(
        ["gcc", *flags, "-o", library, *sources, "-ldl", "-lpthread"], check=True, capture_output=True, text=True
    )
    (folder / "libcuda.so").symlink_to(library.name)
    return library


def include_folders(site: Path) -> list[Path]:
    """Return the folders of CUDA's headers: the runtime's that PyTorch uses, then Triton's, which have what those lack.

    Triton's alone may be of an older version, in which functions and structures are others.
    """
    found = [*site.glob("nvidia/cu*/include"), site / "triton" / "backends" / "nvidia" / "include"]
    return [folder for folder in found if (folder / "cuda.h").is_file()]


def stub_lines(site: Path, driver: Path) -> list[str]:
    """Return a weak definition of each function that PyTorch's libraries miss or that the driver has."""
    names = set(re.findall(r"\b(cu[A-Z]\w+)\(", driver.read_text(encoding="utf-8")))
    for library in [*site.glob("torch/lib/*.so"), *site.glob("torchvision/*.so")]:
        listed = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True).stdout
        names |= set(re.findall(rf" U ({LIBRARIES})", listed))
    return ["void nullgpu_call(const char *);", *(stub(name) for name in sorted(names))]


def stub(name: str) -> str:
    """Return C that succeeds; what is created must not be null, and work is counted."""
    body = f'nullgpu_call("{name}"); ' if WORK.search(name) and not NO_WORK.search(name) else ""
    if CREATES.match(name):
        return f"__attribute__((weak)) long {name}(void **made) {{ {body}if (made) *made = (void *)0x2000; return 0; }}"
    return f"__attribute__((weak)) long {name}(void) {{ {body}return 0; }}"


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
