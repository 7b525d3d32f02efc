"""The page of `treepo-trl view` in a real browser."""

import gzip
import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By

from tests.support.browser import requested_urls, wait_for
from tests.support.tree_logs import logged_line, sampled_line, small_tree, write_lines, write_run
from treepo_trl.apps.view import Index, find_sources, make_server, packed_trees
from treepo_trl.apps.view.command import write_page


WORDS = {5: "Let us", 6: " see:", 7: " it is", 8: " 12.", 9: " thirteen", 10: "So", 11: " a", 12: " Wrong", 13: " end"}
REWARDS = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, None]]
"""Of the prompts of the first step, then of the only one of the second."""
NODES = 5


def decode(token_ids: list[int]) -> str:
    return "".join(WORDS.get(token, f"<{token}>") for token in token_ids)


def run_folder(folder: Path, step_rewards: dict[int, list[list[float | None]]], note: str = "") -> Path:
    steps = {
        step: [logged_line(small_tree(i), f"Question {i}{note}", each, step) for i, each in enumerate(rewards)]
        for step, rewards in step_rewards.items()
    }
    return write_run(folder, steps)


def packed(*runs: Path, text: Any = decode) -> tuple[Iterator[bytes], Index]:
    index: Index = {"sources": [], "is_text": True, "trees": []}
    sources = find_sources(map(str, runs))
    return packed_trees(sources, [text] * len(sources), index), index


def open_page(browser: Chrome, path: Path, *runs: Path, text: Any = decode) -> None:
    write_page(path, *packed(*runs, text=text))
    load(browser, path.as_uri())


def load(browser: Chrome, url: str) -> None:
    """Open a page, and wait for its first tree and for the frame in which it gets its final size."""
    browser.get(url)
    wait_for(browser, "document.querySelector('.node.selected')")
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def attributes(browser: Chrome, selector: str, name: str) -> list[str]:
    """An attribute of all elements, read at one time: the page may draw them anew at any other."""
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.getAttribute(arguments[1]))"
    return browser.execute_script(script, selector, name)


def texts(browser: Chrome, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)"
    return browser.execute_script(script, selector)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run", {0: REWARDS[:3], 1: REWARDS[3:]})


@pytest.fixture
def page(browser: Chrome, tmp_path: Path, run: Path) -> Chrome:
    """The page of `run`, with its first tree."""
    open_page(browser, tmp_path / "trees.html", run)
    return browser


def press(browser: Chrome, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def heading(browser: Chrome, pane: int = 0) -> str:
    return texts(browser, ".pane h2")[pane]


def selected(browser: Chrome) -> int:
    return int(attributes(browser, ".node.selected", "data-node")[0])


def listed(browser: Chrome) -> list[int]:
    return [int(number) for number in attributes(browser, ".row[data-tree]", "data-tree")]


def segment_texts(browser: Chrome) -> list[str]:
    """Texts of the path's segments, the prompt first."""
    return texts(browser, ".segment pre")


def search(browser: Chrome, text: str, expected: list[int]) -> None:
    field = browser.find_element(By.ID, "search")
    field.clear()
    field.send_keys(text)
    rows = "[...document.querySelectorAll('.row[data-tree]')].map((row) => row.dataset.tree)"
    wait_for(browser, f"{rows}.join() === arguments[0]", ",".join(map(str, expected)))


# What is drawn


def test_every_node_is_drawn_as_long_as_its_tokens_and_as_high_as_its_leaves(page: Chrome) -> None:
    rects = page.execute_script(
        "return [...document.querySelectorAll('.node')].map((node) => ['data-node', 'x', 'y', 'width', 'height'].map("
        "(name) => Number(node.getAttribute(name))))"
    )
    assert sorted(rect[0] for rect in rects) == list(range(NODES))
    # A pixel is left between two nodes.
    x, y, width, height = ({int(rect[0]): rect[i] + (i > 2) for rect in rects} for i in range(1, 5))
    per_token, per_leaf = width[2], height[2]
    assert {node: value / per_token for node, value in width.items()} == pytest.approx({0: 2, 1: 2, 2: 1, 3: 1, 4: 3})
    assert {node: value / per_leaf for node, value in height.items()} == pytest.approx({0: 2, 1: 1, 2: 1, 3: 1, 4: 1})
    assert {node: value / per_leaf for node, value in y.items()} == pytest.approx({0: 0, 1: 0, 2: 1, 3: 2, 4: 2})
    for child, parent in {1: 0, 2: 0, 4: 3}.items():
        assert x[child] == pytest.approx(x[parent] + width[parent])


def test_the_path_is_shown_with_its_values_and_its_end(page: Chrome) -> None:
    assert "step 0 · prompt 0" in heading(page)
    assert segment_texts(page) == ["Question 0", "Let us see:", " it is 12."]
    assert texts(page, ".segment .quiet") == [
        "prompt",
        "segment 1 · 2 tokens · 2 leaves below · value 0.5 · mean advantage 0 · entropy 1.25 · log-probability -1",
        "segment 2 · 2 tokens · reward 1 · advantage 0.5 · entropy 0.5 · log-probability -1.5",
    ]
    assert texts(page, ".end")[0] == "Ended: stop (an end token)."


def test_colours_follow_values(page: Chrome) -> None:
    def fills() -> dict[str, str]:
        return dict(zip(attributes(page, ".node", "data-node"), attributes(page, ".node", "fill"), strict=True))

    value = fills()
    assert value["1"] != value["2"], "rewards 1 and 0"
    assert value["2"] == value["4"] == value["3"], "reward 0"
    press(page, "4")
    logprob = fills()
    assert logprob["2"] != logprob["4"], "log-probabilities -3 and -1"
    assert logprob["0"] == logprob["4"], "-1 both"
    press(page, "3")
    assert fills()["3"].endswith("25%)"), "no entropy is known"


def test_fallbacks_and_answers_of_tools_are_marked(browser: Chrome, tmp_path: Path) -> None:
    trees, index = packed(run_folder(tmp_path / "run", {0: REWARDS[:1]}))
    view = json.loads(gzip.decompress(next(trees)))
    assert not list(trees)
    view["nodes"][0] |= {"is_sampled": False, "answers": ["tool add: <b>3</b>"], "failures": 1}
    view["nodes"][1]["calls"] = ["add({})"]
    write_page(tmp_path / "trees.html", [gzip.compress(json.dumps(view).encode())], index)
    load(browser, (tmp_path / "trees.html").as_uri())
    assert attributes(browser, ".node.fallback", "data-node") == ["3", "4"]
    assert attributes(browser, ".node.given", "data-node") == ["0"]
    path = browser.find_element(By.ID, "path").text
    assert "not sampled" in path
    assert "1 failed call" in path
    assert {"tool add: <b>3</b>", "add({})"} <= set(texts(browser, ".segment pre"))


def test_trees_without_rewards(browser: Chrome, tmp_path: Path) -> None:
    lines = [sampled_line(small_tree(i), f"Question {i}", ["", "", ""], index=i) for i in range(2)]
    open_page(browser, tmp_path / "trees.html", write_lines(tmp_path / "trees.jsonl", lines))
    assert attributes(browser, "#colours [aria-pressed=true]", "data-name") == ["logprob"]
    assert "weight 0.5" in texts(browser, ".segment.selected .quiet")[0]
    assert listed(browser) == [0, 1]
    page_texts = texts(browser, "body > :not(script)")
    assert [word for word in ("NaN", "Infinity", "undefined", "null") if word in "".join(page_texts)] == []
    browser.find_element(By.CSS_SELECTOR, '[data-name="mixed"]').click()
    assert listed(browser) == []


# Walking, filters, search


def test_arrows_walk_the_tree(page: Chrome) -> None:
    walked = [selected(page)]
    for key in (Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_RIGHT):
        press(page, key)
        walked.append(selected(page))
    assert walked == [1, 2, 4, 4, 3, 0, 1]
    press(page, Keys.ARROW_LEFT)
    assert texts(page, ".end")[0] == "Goes on in 2 segments."


def test_keys_go_to_other_prompts(page: Chrome) -> None:
    for key, prompt in (("n", 1), ("n", 2), ("p", 1)):
        press(page, key)
        wait_for(page, "document.querySelector('.row.current').dataset.tree === arguments[0]", str(prompt))
        assert f"step 0 · prompt {prompt}" in heading(page)
        assert segment_texts(page)[0] == f"Question {prompt}"


def test_a_click_selects_a_node(page: Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, '[data-node="4"]').click()
    assert segment_texts(page)[1:] == ["So", " a Wrong end"]


@pytest.mark.parametrize(
    ("name", "numbers"), [("all", [0, 1, 2, 3]), ("mixed", [0, 3]), ("right", [1]), ("wrong", [2])]
)
def test_filters(page: Chrome, name: str, numbers: list[int]) -> None:
    page.find_element(By.CSS_SELECTOR, f'[data-name="{name}"]').click()
    assert listed(page) == numbers
    assert page.find_element(By.ID, "count").text == f"{len(numbers)} of 4 prompts"


def test_search_reads_prompts_and_completions(page: Chrome) -> None:
    search(page, "question 2", [2])
    search(page, "SEE: THIRTEEN", [0, 1, 2, 3])  # it runs over two segments
    wait_for(page, "document.querySelector('.node.found')")
    assert attributes(page, ".node.found", "data-node") == ["2"]
    assert selected(page) == 2
    search(page, "no such text", [])
    search(page, "wrong", [0, 1, 2, 3])
    wait_for(page, "document.querySelector('mark')?.textContent === 'Wrong'")


# Comparison


def test_two_runs_stand_side_by_side(browser: Chrome, tmp_path: Path, run: Path) -> None:
    other = run_folder(tmp_path / "other", {0: [REWARDS[1], REWARDS[1]], 5: [REWARDS[1]]})
    open_page(browser, tmp_path / "trees.html", run, other)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".node")) == 2 * NODES
    assert f"step 0 · {run} · prompt 0" in heading(browser, 0)
    assert f"step 0 · {other} · prompt 0" in heading(browser, 1)
    press(browser, "x", Keys.ARROW_DOWN)
    assert attributes(browser, ".node.selected", "data-node") == ["1", "2"]
    press(browser, "n")
    wait_for(browser, "document.querySelector('.row.current').dataset.tree === '1'")
    assert f"step 0 · {other} · prompt 1" in heading(browser, 1)


def test_two_steps_stand_side_by_side(page: Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, "#beside option[value='0:1']").click()
    wait_for(page, "document.querySelectorAll('.node').length === arguments[0]", 2 * NODES)
    assert "step 1 · prompt 0 · 3 leaves · mean reward 0.5" in heading(page, 1)


# What models write stays text, and nothing leaves the page


@pytest.fixture
def outside() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that no page should ask, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_a_model_writes_stays_text(browser: Chrome, tmp_path: Path, outside: tuple[str, list[str]]) -> None:
    url, asked = outside
    evil = (
        f"</script><script>document.title = 'owned'</script><img src='{url}/image' onerror=\"document.title='owned'\">"
    )
    run = run_folder(tmp_path / "run", {0: REWARDS[:1]}, note=f" {evil}")
    open_page(browser, tmp_path / "trees.html", run, text=lambda ids: evil * len(ids))
    assert segment_texts(browser) == [f"Question 0 {evil}", evil * 2, evil * 2]
    assert evil in texts(browser, ".row[data-tree]")[0]
    assert browser.title == f"Trees of {run}"
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert asked == []


def test_the_policy_lets_nothing_out(page: Chrome, tmp_path: Path, outside: tuple[str, list[str]]) -> None:
    url, asked = outside
    assert urllib.request.urlopen(f"{url}/check").status == 204
    requested_urls(page)
    load(page, (tmp_path / "trees.html").as_uri())
    press(page, "n")
    wait_for(page, "document.querySelector('.row.current').dataset.tree === '1'")
    assert requested_urls(page) == [(tmp_path / "trees.html").as_uri()]
    refused = page.execute_async_script(
        "const [url, done] = arguments; const image = new Image(); image.onerror = () => fetch(url + '/fetch').then("
        "() => done('let through'), () => done('refused')); image.src = url + '/image'; document.body.append(image)",
        url,
    )
    assert refused == "refused"
    assert asked == ["/check"]


def test_the_page_of_the_server_is_the_same(browser: Chrome, run: Path) -> None:
    trees, index = packed(run)
    server = make_server(0, trees, index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        requested_urls(browser)
        load(browser, server.url)
        assert len(browser.find_elements(By.CSS_SELECTOR, ".node")) == NODES
        search(browser, "question 3", [])
        search(browser, "question 1", [1])
        wait_for(browser, "document.querySelector('.row.current')?.dataset.tree === '1'")
        assert segment_texts(browser)[1] == "Let us see:"
        assert {url.removeprefix(server.url) for url in requested_urls(browser)} == {
            "",
            *(f"tree/{i}" for i in range(4)),
        }
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_without_a_tokenizer_ids_are_shown_and_it_is_said(browser: Chrome, tmp_path: Path, run: Path) -> None:
    open_page(browser, tmp_path / "trees.html", run, text=None)
    assert segment_texts(browser)[1:] == ["5 6 ", "7 8 "]
    assert "token ids" in browser.find_element(By.CSS_SELECTOR, ".no-text").text
