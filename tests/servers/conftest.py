"""Fixtures of the tests with servers."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from treepo_trl.servers import fleet


@pytest.fixture
def lost_servers_are_asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_WAIT", "_LONGEST_WAIT"):
        monkeypatch.setattr(fleet, name, 0.05)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
