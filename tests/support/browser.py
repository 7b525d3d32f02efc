"""A real browser without a window, and what its pages have asked the network for."""

import json
import shutil
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.ui import WebDriverWait


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,900",
)
WAIT = 30
"""Seconds after which what a test waits for does not come."""


def programs() -> tuple[str, str] | None:
    """Paths of a browser and its driver, if both are installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return None if browser is None or driver is None else (browser, driver)


def start_browser(profile: Path) -> Chrome:
    """
    The browser with an empty profile in a folder, where it also writes files.

    Raises:
        FileNotFoundError: if there is no browser.
    """
    found = programs()
    if found is None:
        raise FileNotFoundError(f"No {' or '.join(BROWSERS)} with a chromedriver: apt-get install chromium-driver")
    options = ChromeOptions()
    options.binary_location = found[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return Chrome(options, ChromeService(found[1]))


def wait_for(browser: Chrome, script: str, *arguments: object) -> object:
    """The first true value of a script's `return` expression."""
    return WebDriverWait(browser, WAIT, poll_frequency=0.05).until(
        lambda driver: driver.execute_script(f"return {script}", *arguments), f"this never was true: {script}"
    )


def requested_urls(browser: Chrome) -> list[str]:
    """Addresses that pages have asked for since the last call, those of data in the page left out."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]
