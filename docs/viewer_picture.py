"""
Draw `docs/tree-viewer.png`: the page of `treepo-trl view` in a browser, at a prompt with different rewards.

    python -m docs.viewer_picture RUN

RUN is the folder of a run with `log_trees: true`; the picture in the repository is of three steps of the quickstart.
"""

import sys
import tempfile
from pathlib import Path

from tests.support.browser import start_browser, wait_for
from treepo_trl.apps.view.command import main as view


PICTURE = Path(__file__).with_name("tree-viewer.png")
SIZE = (1400, 780)
KEYS = ("ArrowDown", "ArrowDown")
"""From the first leaf on."""


def draw(run: str) -> None:
    """Write the picture of the run's tree whose mean reward is the nearest to 1/2."""
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "trees.html"
        view([run, "--out", str(page)])
        browser = start_browser(Path(scratch) / "profile")
        try:
            browser.set_window_size(*SIZE)
            browser.get(page.as_uri())
            wait_for(browser, "document.querySelector('.node.selected')")
            tree = browser.execute_script(
                "const unlike = (number) => Math.abs(meanReward(index.trees[number].rewards) - 0.5);"
                "return [...index.trees.keys()].sort((a, b) => unlike(a) - unlike(b))[0]"
            )
            browser.execute_async_script("open(arguments[0]).then(arguments[1])", tree)
            for key in KEYS:
                browser.execute_script(
                    "document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))", key
                )
            browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
            browser.save_screenshot(str(PICTURE))
        finally:
            browser.quit()


if __name__ == "__main__":
    draw(sys.argv[1])
