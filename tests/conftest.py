"""Environment, fixtures and order of all tests."""

import os


# vLLM's engine core in this process, on a small cache; before anything imports it.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and sums keep their order
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gc
import io
import json
import random
import sys
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import hypothesis
import pytest
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tests.support.models import make_model, make_tokenizer
from tests.support.paths import ROOT
from tests.support.sample_runs import PROMPTS
from tests.support.train_runs import write_files
from tests.support.vllm_servers import LORA_FLAGS, VLLMServer, vllm_servers


hypothesis.settings.register_profile("any-speed", deadline=None)  # a busy machine stands still now and then
if hypothesis.settings.get_current_profile_name() == "default":  # and not that of `benchmarks.mutants`
    hypothesis.settings.load_profile("any-speed")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny model and its tokenizer, loadable by transformers and vLLM."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny model whose tokenizer can call tools."""
    from tests.support.tools import make_chat_model, make_chat_tokenizer

    folder = tmp_path_factory.mktemp("chat-model")
    make_chat_model().save_pretrained(folder)
    make_chat_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's working folder with a dataset of prompts; nothing on standard input."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": 1}) + "\n" for p in PROMPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


@pytest.fixture
def training_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's working folder: a dataset, a module of rewards, and no package."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_rewards", "my_game"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def small_model_dir() -> str:
    """Folder of SmolLM2-135M-Instruct; shared with the quickstart."""
    from treepo_trl.quickstart import small_model

    return small_model(ROOT / ".cache/smollm2-135m-instruct")


@pytest.fixture(scope="session")
def started_servers(tiny_model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VLLMServer]]:
    flags = ["--dtype", "float32", *LORA_FLAGS]
    with vllm_servers(2, tiny_model_dir, tmp_path_factory.mktemp("servers"), flags) as started:
        yield started


@pytest.fixture
def servers(started_servers: list[VLLMServer]) -> list[VLLMServer]:
    """Two real vLLM servers, both of which answer; their start takes half a minute, so tests share them."""
    for server in started_servers:
        if not server.is_running():
            server.start()
            server.wait()
    return started_servers


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> Qwen3ForCausalLM:
    return make_model()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


def uses_servers(item: pytest.Item | None) -> bool:
    return item is not None and "started_servers" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    The real vLLM comes last: it binds the process to cores and starts a process group. Its servers come first.

    Without it what needs it is skipped, as in the environment of the newest transformers (`make test-newest`).
    """
    if find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm") or item.get_closest_marker("needs_vllm"):
                item.add_marker(pytest.mark.skip(reason="needs vLLM: `make setup` installs it"))
    items.sort(key=lambda item: (item.get_closest_marker("vllm") is not None, not uses_servers(item)))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Servers take gigabytes: they end with the last test that needs them."""
    if uses_servers(item) and not uses_servers(nextitem):
        for server in cast(pytest.Function, item).funcargs.get("servers", ()):
            server.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """An engine of vLLM is a cycle of objects, and its cache a gigabyte: a dozen of them would stay until the end."""
    try:
        return (yield)
    finally:
        if item.get_closest_marker("vllm") is not None:
            gc.unfreeze()  # vLLM freezes all objects once an engine has started
            gc.collect()
