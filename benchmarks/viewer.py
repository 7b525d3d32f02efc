"""
How long the page of `treepo-trl view` lets one wait, in a headless browser, on a log that is made up here.

    python -m benchmarks.viewer
"""

import argparse
import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium.webdriver import Chrome

from benchmarks.common import make_parser
from tests.support.browser import start_browser, wait_for
from tests.support.tree_logs import logged_line
from treepo_trl.sampling import SegmentTree


NUM_STEPS = 20  # times from one prompt to the next


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--leaves", type=int, default=64)
    parser.add_argument("--levels", type=int, default=14)
    parser.add_argument("--segment_length", type=int, default=32)
    return parser.parse_args()


def random_tree(rng: random.Random, leaves: int, levels: int, segment_length: int, vocabulary: int) -> SegmentTree:
    """A tree whose levels double until they have all leaves."""
    tree = SegmentTree(rng.choices(range(vocabulary), k=100))
    parents: list[int | None] = [None]
    for depth in range(levels):
        width = min(leaves, 2 ** (depth + 1))
        reason = "stop" if depth == levels - 1 else None
        parents = [
            tree.add(
                parents[i * len(parents) // width],
                rng.choices(range(vocabulary), k=segment_length),
                [round(-rng.expovariate(2), 6) for _ in range(segment_length)],
                reason,
            )
            for i in range(width)
        ]
    tree.sort_leaves()
    return tree


def write_log(folder: Path, args: argparse.Namespace) -> int:
    """Write a run of one step and a tokenizer of random words; returns the nodes of a tree."""
    rng = random.Random(0)
    vocabulary = save_tokenizer(folder, rng)
    file = folder / "trees" / "trees_000000.jsonl"
    file.parent.mkdir()
    num_nodes = 0
    with file.open("w") as lines:
        for number in range(args.prompts):
            tree = random_tree(rng, args.leaves, args.levels, args.segment_length, vocabulary)
            rewards: list[float | None] = [float(rng.random() < 0.3) for _ in tree.leaves]
            lines.write(json.dumps(logged_line(tree, f"Question {number}", rewards)) + "\n")
            num_nodes = len(tree.nodes)
    return num_nodes


def save_tokenizer(folder: Path, rng: random.Random) -> int:
    """A tokenizer of words, with four letters in the mean; returns how many."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 7))): None for _ in range(20_000)}
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=next(iter(words)))
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)
    return len(words)


def paint_milliseconds(browser: Chrome, url: str) -> tuple[float, float]:
    """From the start of the navigation to the first paint, and to the first tree."""
    browser.get(url)
    wait_for(browser, "document.querySelector('.node.selected')")
    paint = browser.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
    return paint, browser.execute_script("return performance.getEntriesByName('tree')[0].startTime")


def step_milliseconds(browser: Chrome) -> float:
    """From the key to the frame after the next prompt's tree is drawn."""
    return browser.execute_async_script(
        "const done = arguments[0]; const start = performance.now();"
        "const afterFrame = () => setTimeout(() => done(performance.now() - start));"
        "const onChange = (_, observer) => { observer.disconnect(); requestAnimationFrame(afterFrame) };"
        "new MutationObserver(onChange).observe(document.querySelector('h2'), {childList: true});"
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'n'}))"
    )


def search_seconds(browser: Chrome, num_prompts: int) -> float:
    """For a text that no tree has: all of them are read."""
    start = time.perf_counter()
    browser.find_element("id", "search").send_keys("no such text")
    wait_for(browser, "document.getElementById('count').textContent === arguments[0]", f"0 of {num_prompts} prompts")
    return time.perf_counter() - start


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        num_nodes = write_log(folder, args)
        page = folder / "trees.html"
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "treepo_trl.cli", "view", str(folder), "--out", str(page)], check=True)
        seconds = time.perf_counter() - start
        browser = start_browser(folder / "profile")
        try:
            first_paint, first_tree = paint_milliseconds(browser, page.as_uri())
            steps = [step_milliseconds(browser) for _ in range(NUM_STEPS)]
            search = search_seconds(browser, args.prompts)
        finally:
            browser.quit()
        log_size = (folder / "trees" / "trees_000000.jsonl").stat().st_size
        print(f"{args.prompts} trees of {num_nodes} segments")
        print(f"log {log_size / 2**20:.0f} MiB, page {page.stat().st_size / 2**20:.0f} MiB in {seconds:.0f} s")
    print(f"first paint {first_paint:.0f} ms, first tree {first_tree:.0f} ms after the start")
    print(f"next prompt {statistics.median(steps):.0f} ms (median), {max(steps):.0f} ms (longest of {NUM_STEPS})")
    print(f"search of all trees {search:.1f} s")


if __name__ == "__main__":
    main()
