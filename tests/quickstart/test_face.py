"""The names that `treepo_trl.quickstart` offers, loaded on first use."""

import subprocess
import sys

import pytest

from treepo_trl import quickstart


def test_every_name_is_found() -> None:
    assert all(callable(getattr(quickstart, name)) or name.isupper() for name in quickstart.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'smal_model'"):
        quickstart.smal_model  # noqa: B018


def test_the_small_model_needs_no_library_of_the_tasks() -> None:
    code = (
        "import sys; from treepo_trl.quickstart import small_model; print({'datasets', 'evaluate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
