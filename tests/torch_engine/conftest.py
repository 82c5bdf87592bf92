import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> None:
    """The models are too small for two threads, which on a busy machine wait for each other."""
    torch.set_num_threads(1)
