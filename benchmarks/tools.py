"""
Trees with tools against TRL's loop over rows: seconds of sampling, calls that run, tokens that are prefilled.

    OMP_NUM_THREADS=1 python -m benchmarks.tools                       # both tables
    OMP_NUM_THREADS=1 python -m benchmarks.tools --milliseconds 50     # tools of one speed

The model is a script that answers at once, so that the seconds are those of tools, of the loop around them, and of the
parsing and templates that both do. Each batch is 64 rows: 8 prompts x 8. Prefilled tokens are those of everything that
a model would be given: for trees each prompt and each answer once; for TRL's loop the whole sequence at every turn, as
`generate` takes it. The second table plays a game under each way of forking.
"""

import functools
import json
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import make_parser, table_head, table_row
from tests.support.environments import GAME, GOES_ON, Counter, Forking, fresh
from tests.support.tools import ScriptedAgent, add, make_chat_model, make_chat_tokenizer, questions, talk_reward
from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.engines import SegmentRequest


WIDTH, PROMPTS = 8, 8
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": WIDTH * PROMPTS,
    "num_generations": WIDTH,
    "max_completion_length": 1200,
    "max_tool_calling_iterations": 5,
    "max_steps": 1,
    "seed": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "trees, early, segments of 40": {"segment_length": 40, "branch_schedule": "early"},
    "trees, sqrt, segments of 40": {"segment_length": 40, "branch_schedule": "sqrt"},
    "trees, spread, segments of 40": {
        "segment_length": 40,
        "branch_schedule": "spread",
        "expected_completion_length": 300,
    },
    "trees, early, a segment per turn": {"segment_length": 1200, "branch_schedule": "early"},
}


@dataclass
class Sampled:
    """What sampling a batch has cost."""

    seconds: float
    executed: int
    on_paths: int
    prefilled: int


def script() -> tuple[list[str], list[str]]:
    """Turns of an agent that calls `add` up to five times."""
    calls = [json.dumps({"name": "add", "arguments": {"a": a, "b": b}}) for a in range(4) for b in range(2)]
    called = [f"<tool_call>\n{each}\n</tool_call>" for each in calls]
    first = [f"I have to add these numbers first, so I ask for it. {each}" for each in called]
    later = [f"That was one step, and here comes the next one. {each}" for each in called[:6]]
    return first, [*later, "So the answer is 7.", "It is 12, as the tool has said."]


def slow_add(milliseconds: float, executed: list[int]) -> Any:
    """`add` that takes a while and counts its calls."""

    def add_slowly(a: int, b: int) -> int:
        executed.append(1)
        time.sleep(milliseconds / 1000)
        return a + b

    add_slowly.__name__, add_slowly.__doc__ = "add", add.__doc__
    return add_slowly


class TimedStock(GRPOTrainer):
    """GRPOTrainer whose model is the script."""

    agent: ScriptedAgent
    sampled: Sampled
    num_prefilled = 0

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        self.num_prefilled += sum(map(len, prompt_ids))
        self.agent.submit([SegmentRequest(i, ids, self.max_completion_length) for i, ids in enumerate(prompt_ids)])
        return [result.token_ids for result in self.agent.collect()], None

    def _generate(self, prompts: Any) -> Any:
        started = time.perf_counter()
        found = super()._generate(prompts)
        seconds = time.perf_counter() - started
        calls = self._metrics["train"]["tools/call_frequency"][-1] * len(found[1])
        self.sampled = Sampled(seconds, 0, round(calls), self.num_prefilled)
        return found


class TimedTrees(TreePOTrainer):
    """TreePOTrainer, whose engine is the script."""

    sampled: Sampled

    def _generate(self, prompts: Any) -> Any:
        started = time.perf_counter()
        found = super()._generate(prompts)
        seconds = time.perf_counter() - started
        calls = self._metrics["train"]["tools/call_frequency"][-1] * len(found[1])
        trees = self._batch.trees
        prefilled = sum(len(tree.prompt_ids) + tree.num_answer_tokens for tree in trees)
        self.sampled = Sampled(seconds, 0, round(calls), prefilled)
        return found


def run(cls: Any, shape: dict[str, Any], milliseconds: float, seed: int) -> Sampled:
    """Train one step, and return what its sampling has cost."""
    executed: list[int] = []
    config = GRPOConfig if cls is TimedStock else TreePOConfig
    with tempfile.TemporaryDirectory() as folder:
        trainer = cls(
            model=make_chat_model(),
            reward_funcs=talk_reward,
            args=config(output_dir=folder, **{**SETTINGS, **shape, "seed": seed}),
            train_dataset=questions(PROMPTS),
            processing_class=make_chat_tokenizer(),
            tools=[slow_add(milliseconds, executed)],
        )
        trainer.agent = ScriptedAgent(seed, *script())
        if cls is TimedTrees:
            trainer.sampler.engine = trainer.policy_engine.engine = trainer.agent
            trainer.agent.model = None
        inputs = [row for row in trainer.train_dataset for _ in range(WIDTH)]
        trainer.model.train()
        trainer._generate_and_score_completions(inputs)
    trainer.sampled.executed = len(executed)
    return trainer.sampled


def play(environment: Any, forking: str | None) -> tuple[int, int, int, int]:
    """Resets, calls that ran, replays among them, and calls on the paths of leaves, of one batch of 8 games x 8."""
    environment = fresh(environment)
    num_run: list[int] = []
    step = environment.step

    @functools.wraps(step)
    def counted(self: Any, n: int) -> str:
        num_run.append(n)
        return step(self, n)

    environment.step = counted
    cls: Any = TimedStock if forking is None else TimedTrees
    config: Any = GRPOConfig if forking is None else TreePOConfig
    shape = (
        {} if forking is None else {"segment_length": 40, "branch_schedule": "early", "environment_forking": forking}
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = cls(
            model=make_chat_model(),
            args=config(output_dir=folder, **{**SETTINGS, **shape}),
            train_dataset=questions(PROMPTS),
            processing_class=make_chat_tokenizer(),
            environment_factory=environment,
        )
        trainer.agent = ScriptedAgent(0, GAME, GOES_ON)
        if cls is TimedTrees:
            trainer.sampler.engine = trainer.policy_engine.engine = trainer.agent
            trainer.agent.model = None
        inputs = [row for row in trainer.train_dataset for _ in range(WIDTH)]
        trainer.model.train()
        trainer._generate_and_score_completions(inputs)
    replayed = trainer._metrics["train"].get("environment/replayed_calls", [0])[-1]
    return len(environment.resets), len(num_run), int(replayed), trainer.sampled.on_paths


def main() -> None:
    """Print both tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--milliseconds", type=float, nargs="+", default=[0, 50, 500], help="Time of a tool call.")
    parser.add_argument("--repeats", type=int, default=3, help="Batches of each kind, with seeds of their own.")
    options = parser.parse_args()
    print(table_head("tool", "sampling", "s", "calls run", "calls on paths", "tokens prefilled"))
    for milliseconds in options.milliseconds:
        for name, shape in (("TRL's loop over rows", None), *SHAPES.items()):
            cls = TimedStock if shape is None else TimedTrees
            runs = [run(cls, shape or {}, milliseconds, seed) for seed in range(options.repeats)]
            mean = [sum(getattr(each, key) for each in runs) / len(runs) for key in Sampled.__annotations__]
            cells = [f"{mean[0]:.2f}", *(f"{value:,.0f}" for value in mean[1:])]
            print(table_row(f"{milliseconds:g} ms", name, *cells), flush=True)
    print()
    print(table_head("environments", "resets", "calls run", "of these replayed", "calls on paths"))
    kinds = (
        ("GRPOTrainer", Counter, None),
        ("`_fork`", Forking, "auto"),
        ("`deepcopy`", Counter, "deepcopy"),
        ("`replay`", Counter, "replay"),
        ("`none`", Counter, "none"),
    )
    for name, environment, forking in kinds:
        print(table_row(name, *(f"{value:,}" for value in play(environment, forking))), flush=True)


if __name__ == "__main__":
    main()
