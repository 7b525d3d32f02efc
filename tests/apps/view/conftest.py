"""The browser, started once."""

from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome

from tests.support.browser import programs, start_browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    if programs() is None:
        pytest.skip("no chromium with a chromedriver here: apt-get install chromium chromium-driver")
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()
