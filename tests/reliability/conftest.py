from pathlib import Path

import pytest

from tests.support.faults import output_of, run_in_process, training


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: str) -> Path:
    """Folder of a training to which nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_in_process(training, folder, tiny_model_dir) == 0, output_of(folder)
    return folder
