import pytest

from simmim.hardware import host
from simmim.hardware.accelerators import find_gpu, gpu_peak_flops, read_facts
from simmim.hardware.host import describe_tpu, reading_cores

ROWS = read_facts().accelerators
# fmt: off
WANTED = [
    "rtx-3060", "rtx-3090", "rtx-4070", "rtx-4090", "rtx-5090", "t4", "v100", "a10g", "l4", "l40s", "a100-40gb",
    "a100-80gb", "h100-sxm", "h100-pcie", "h200", "b200", "mi300x", "apple-m4-max", "tpu-v4", "tpu-v5e", "tpu-v5p",
    "tpu-v6e", "tpu7x",
]
# fmt: on


@pytest.mark.parametrize("name", WANTED)
def test_memory_bandwidth_and_source_of_an_accelerator_are_known(name):
    row = ROWS[name]
    assert row.memory_gb > 0
    assert row.bandwidth_gb_s > 0
    assert row.source


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_a_price_names_its_source(row):
    assert row.price_source or (row.price is None and row.spot is None)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_a_narrower_type_is_never_slower(row):
    known = [row.tflops[name] for name in ("fp32", "tf32", "fp16", "fp8") if name in row.tflops]
    assert known == sorted(known)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 3060", "rtx-3060"),
    ],
)
def test_a_gpu_is_known_by_the_name_of_its_driver(driver, name):
    row = find_gpu(driver)
    assert row is not None
    assert row.name == name


@pytest.mark.parametrize("driver", ["NVIDIA GeForce RTX 3060 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40"])
def test_a_relative_of_a_known_gpu_is_not_taken_for_it(driver):
    assert find_gpu(driver) is None


def test_a_gpu_without_bf16_has_no_bf16_peak():
    assert gpu_peak_flops("Tesla T4") is None


def test_a_users_file_changes_a_fact_and_adds_an_accelerator(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        "[[accelerator]]\nname = 'l4'\nprice = 0.2\n"
        "[[accelerator]]\nname = 'mine'\nmemory_gb = 8\nbandwidth_gb_s = 100\n"
    )
    rows = read_facts(file).accelerators
    assert rows["l4"].price == 0.2
    assert rows["l4"].memory_gb == 24
    assert rows["mine"].memory_gb == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[accelerator]]\nname = 'l4'\ncolour = 'red'\n", "unexpected keyword argument 'colour'"),
        ("[[accelerator]]\nmemory_gb = 8\n", "without a name"),
        ("name =", "is not TOML"),
    ],
)
def test_a_users_file_with_a_mistake_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_facts(file)
    assert "\n" not in str(error.value)


def test_tpu_chips_are_counted_by_their_pci_numbers(tmp_path):
    for place, numbers in {"a": ("0x1ae0", "0x0063"), "b": ("0x1ae0", "0x0042"), "c": ("0x1ae0", "0x0063")}.items():
        (tmp_path / place).mkdir()
        for name, number in zip(("vendor", "device"), numbers, strict=True):
            (tmp_path / place / name).write_text(number + "\n")
    assert describe_tpu(tmp_path) == "2 × TPU v5e"  # Google's network card is none
    assert describe_tpu(tmp_path / "elsewhere") == "none seen"


@pytest.mark.parametrize(("cores", "local", "share"), [(8, None, 8), (8, "4", 2), (9, "4", 2), (2, "8", 1)])
def test_processes_of_torchrun_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, local: str | None, share: int
) -> None:
    monkeypatch.setattr(host, "cpu_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert reading_cores() == share
