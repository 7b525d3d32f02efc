"""Lines of other packages that are left out, and those that are not."""

import logging

import pytest

from treepo_trl.preflight import quiet_terminal
from treepo_trl.preflight.quiet import _NOISE


@pytest.mark.parametrize("name", _NOISE)
def test_the_line_is_left_out_and_others_are_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(name)
    filters = list(logger.filters)
    logger.addHandler(caplog.handler)  # those of transformers go to no other logger
    logger.propagate = False
    quiet_terminal()
    try:
        logger.warning(f"%s: {_NOISE[name]} (%s)", "before", "after")
        logger.warning("another line")
    finally:
        logger.filters[:] = filters
        logger.removeHandler(caplog.handler)
        logger.propagate = True
    assert caplog.messages == ["another line"]
