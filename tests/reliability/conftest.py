from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.faults import output_of, run_in_process, training


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: str) -> Path:
    """Folder of a training to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_in_process(training, folder, tiny_model_dir) == 0, output_of(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The trainings of this process sum in the order of those in processes of their own, which have one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
