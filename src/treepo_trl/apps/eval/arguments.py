"""The options of `treepo-trl eval` beside those of the engine, of drawing and of trees."""

from dataclasses import dataclass, field
from typing import Literal, cast

from treepo_trl.command_line.arguments import TRL_REWARDS, SampleArguments, help_of, json_object
from treepo_trl.command_line.engine_arguments import EngineArguments
from treepo_trl.engines import SamplingOptions
from treepo_trl.evaluation import default_ks
from treepo_trl.sampling import TreeSamplingConfig
from treepo_trl.sampling.first_widths import num_first_branches
from treepo_trl.settings import Ranges, check_fields, check_int, check_text


_RANGES: Ranges = {"max_prompts": (lambda value: value >= 1, "at least 1")}


@dataclass
class EvalArguments:
    """What `treepo-trl eval` evaluates, on which prompts, and where it writes."""

    adapters: list[str] | None = field(
        default=None,
        metadata={"help": "LoRA adapters to evaluate beside the model, of the hub or folders: a column each."},
    )
    base: bool = field(default=True, metadata={"help": "Whether the model without an adapter is evaluated too."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts with answers: gsm8k, math500 or aime (of the hub), addition (the quickstart's held-out "
            "tasks), reasoning_gym:NAME (a data set of reasoning-gym, with its own scores), a dataset of the hub, a "
            "file (json, jsonl, csv, parquet), or a folder written by `Dataset.save_to_disk`."
        },
    )
    dataset_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a hub dataset; of reasoning-gym its settings as JSON, such as "
            """'{"min_terms": 2}'."""
        },
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: test, or the only one."}
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column of the prompts, text or messages. Default: `prompt`, or the only column."},
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of the answers. Default: `solution`, else `answer`."}
    )
    max_prompts: int | None = field(
        default=None,
        metadata={"help": "Number of prompts, from the first on. Default: all; 64 of addition and reasoning-gym."},
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata=help_of(SampleArguments, "chat_template_kwargs")
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Reward functions that score instead of math-verify: {', '.join(TRL_REWARDS)}, or import paths "
            "such as my_package.rewards.my_reward. A score of at least 1 is right."
        },
    )
    completions: Literal["independent", "trees"] = field(
        default="independent",
        metadata={
            "help": "How `num_generations` completions of a prompt are sampled. `trees` shares segments, and its "
            "weighted leaves estimate the same; k then goes up to the children of the prompt "
            "(`initial_branching_factor`)."
        },
    )
    k: list[int] | None = field(
        default=None,
        metadata={
            "help": "Which k of pass@k and maj@k. Default: 1, 2, 4 and so on, up to the independent samples of a "
            "prompt."
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the results (results.json) and the samples (a JSONL file per column), each prompt as "
            "soon as it is done. Default: none; the table is printed."
        },
    )
    resume: bool = field(default=False, metadata=help_of(SampleArguments, "resume"))
    seed: int = field(default=0, metadata=help_of(SampleArguments, "seed"))

    def __post_init__(self) -> None:
        check_fields(self, EvalArguments, _RANGES)
        adapters, rewards = cast("tuple[object, object]", (self.adapters, self.reward_funcs))
        self.adapters = [adapters] if isinstance(adapters, str) else self.adapters  # in a file one needs no list
        self.reward_funcs = [rewards] if isinstance(rewards, str) else self.reward_funcs
        for option, names in (("adapters", self.adapters), ("reward_funcs", self.reward_funcs)):
            for name in names or []:
                check_text(option, name)
        if self.k is not None:
            given = cast(object, self.k)
            self.k = [check_int("k", value) for value in (given if isinstance(given, list) else [given])]
        if isinstance(self.dataset_config, str) and self.dataset_config.lstrip().startswith("{"):
            self.dataset_config = json_object("dataset_config", self.dataset_config, '{"min_terms": 2}')
        self.chat_template_kwargs = json_object(
            "chat_template_kwargs", self.chat_template_kwargs, '{"enable_thinking": false}'
        )
        if self.dataset_name is None:
            raise ValueError(
                "No data: give `--dataset_name`, such as gsm8k, math500, aime, addition, reasoning_gym:NAME, a hub "
                "id, a file or a folder."
            )
        if not self.base and not self.adapters:
            raise ValueError("Nothing to evaluate: `--base` is false and no `--adapters` are given.")
        if self.resume and self.output is None:
            raise ValueError("`--resume` goes on from the samples in a folder: give it as `--output`.")


def checked_ks(
    arguments: EvalArguments, engine: EngineArguments, options: SamplingOptions, config: TreeSamplingConfig
) -> list[int]:
    """
    The k of pass@k and maj@k, after a look at options that exclude each other.

    Raises:
        ValueError: for k above the independent samples of a prompt, more than one greedy completion of a prompt, and
            settings without an unbiased estimate.
    """
    if engine.adapter_name_or_path is not None:
        raise ValueError("`eval` takes adapters as `--adapters DIR ...`, not as `--adapter_name_or_path`.")
    if options.temperature == 0 and config.num_generations > 1:
        raise ValueError(
            f"`temperature` is 0, so all `num_generations` ({config.num_generations}) completions of a prompt would "
            "be the same. Set `--num_generations 1` for greedy decoding, or a temperature above 0."
        )
    num_samples, what = config.num_generations, f"`num_generations` ({config.num_generations})"
    if arguments.completions == "independent" and config.stop_pattern is not None:
        raise ValueError(
            f"`stop_pattern` is {config.stop_pattern!r}, and it ends paths of trees alone. Leave it out, or set "
            "`--completions trees`."
        )
    if arguments.completions == "trees":
        if config.max_tree_tokens is not None:
            raise ValueError(
                "`max_tree_tokens` cuts paths because of what was sampled, so the weights of leaves are not exact. "
                "Leave it out to evaluate."
            )
        num_samples = num_first_branches(config)
        what = f"the {num_samples} children that a prompt has at least"
    ks = default_ks(num_samples) if arguments.k is None else sorted(set(arguments.k))
    if not ks or ks[0] < 1 or ks[-1] > num_samples:
        reason = "Raise `--num_generations`, or lower `--k`."
        if arguments.completions == "trees":
            reason = (
                "Leaves below the same child share tokens, and no unbiased estimate can be made of more. Raise "
                f"`--initial_branching_factor` (with `--num_generations {config.num_generations}` or more), or lower "
                "`--k`."
            )
        raise ValueError(f"`k` is {arguments.k}; it must be between 1 and {what}. {reason}")
    return ks
