import pytest
import torch

from . import worker


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> None:
    """The models are too small for two threads, which on a busy machine wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def whole(tmp_path_factory: pytest.TempPathFactory) -> worker.Finished:
    """A training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return worker.finish(worker.settings(folder / "run"), folder / "log")
