"""A new engine is three methods, and `complete` of the base class serves requests with them."""

import random
import re
import runpy
from pathlib import Path

import pytest

from tests.support.fakes import FakeEngine, memoryless
from tests.support.paths import ROOT
from treepo_trl.engines import SegmentEngine, SegmentRequest


def test_the_engine_of_the_docs_samples_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "new-engine.md").read_text(), re.DOTALL)
    path = tmp_path / "new_engine.py"
    path.write_text("\n".join(blocks))
    names = runpy.run_path(str(path))

    tree, engine = names["tree"], names["sampler"].engine
    assert isinstance(engine, SegmentEngine)
    assert len(tree.leaves) == 8
    printed = [eval(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [tree.completion_ids(leaf) for leaf in tree.leaves]
    assert all(completion[-1] == 0 or len(completion) == 12 for completion in printed)
    assert sorted(names["texts"]) == [0, 1, 2]
    methods = re.findall(r"    def (\w+)", blocks[0])
    assert methods == ["__init__", "submit", "collect", "abort"]


@pytest.mark.parametrize("missing", ["submit", "collect", "abort"])
def test_an_engine_without_one_of_the_three_cannot_be_made(missing: str) -> None:
    methods = {name: lambda self: None for name in ("submit", "collect", "abort") if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Engine", (SegmentEngine,), methods)()


def requests_of(count: int) -> list[SegmentRequest]:
    return [SegmentRequest(i, [5], 3) for i in range(count)]


def test_complete_yields_each_result_once_as_it_comes(rng: random.Random) -> None:
    engine = FakeEngine(memoryless(0.3), arrival=rng)
    results = engine.complete(requests_of(20))
    assert engine.requests == []  # nothing is submitted before the first result is asked for
    first = next(results)
    assert len(engine.results) < len(engine.requests) == 20
    assert [first, *results] == engine.results
    assert sorted(result.request_id for result in engine.results) == list(range(20))
    assert engine.aborted == 0
    assert engine.ended == [0]
    assert list(FakeEngine(memoryless(0.3)).complete([])) == []


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["submit", "collect"])
def test_an_error_of_the_engine_aborts_what_complete_has_submitted(error: BaseException, method: str) -> None:
    engine = FakeEngine(memoryless(0.3), arrival=random.Random(0))
    results = engine.complete(requests_of(20))
    if method == "collect":
        next(results)

    def fail(*args: object) -> None:
        raise error

    setattr(engine, method, fail)
    with pytest.raises(type(error)) as caught:
        list(results)
    assert caught.value is error
    assert engine.aborted == 1


def test_a_caller_of_complete_that_stops_early_aborts_the_rest() -> None:
    engine = FakeEngine(memoryless(0.3), arrival=random.Random(0))
    results = engine.complete(requests_of(20))
    next(results)
    results.close()
    assert engine.aborted == 1
