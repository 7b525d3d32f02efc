"""`treepo-trl eval`: mean@k, pass@k and maj@k of a model and its adapters, side by side."""

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from transformers import PreTrainedTokenizerBase

from treepo_trl.engines import SamplingOptions
from treepo_trl.sampling import SegmentTree, TreeSampler, TreeSamplingConfig

from .adapters import check_adapters, labels_of
from .arguments import options_parser
from .cost_table import sample_independent
from .engine import EngineArguments, load_tokenizer, use_adapter
from .errors import user_errors
from .eval_arguments import EvalArguments, checked_ks
from .eval_data import EvalSet, load_eval_set
from .eval_output import EvalFolder, opened_folder
from .eval_scores import Samples, Scorer, make_scorers, prompt_values
from .eval_table import results_of, results_table
from .prompts import prompt_token_ids
from .sample import advice_to_resume, build_sampler, progress_bar


@dataclass
class Evaluation:
    """All that is known before a model is loaded."""

    arguments: EvalArguments
    engine: EngineArguments
    options: SamplingOptions
    config: TreeSamplingConfig
    tokenizer: PreTrainedTokenizerBase
    ks: list[int]
    eval_set: EvalSet
    scorers: Mapping[str, Scorer]
    prompt_ids: list[list[int]]
    columns: dict[str, int | None]
    """Which adapter each column of the table samples with, by its name; `None` for the model alone."""
    trees: dict[str, dict[int, SegmentTree]] = field(default_factory=dict)
    """Sampled trees by column and index of the prompt."""

    def remaining(self, column: str) -> dict[int, list[int]]:
        """Prompts by their index that a column has no tree of."""
        return {i: ids for i, ids in enumerate(self.prompt_ids) if i not in self.trees[column]}


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl eval`."""
    with ExitStack() as stack:
        with user_errors():
            parser = options_parser(
                "treepo-trl eval", EvalArguments, EngineArguments, SamplingOptions, TreeSamplingConfig
            )
            evaluation = prepared(*parser.parse_args_and_config(argv))
            arguments = evaluation.arguments
            stack.enter_context(advice_to_resume(arguments.output, can_resume=arguments.output is not None))
            folder = stack.enter_context(opened_folder(arguments, settings_of(evaluation), evaluation.prompt_ids))
            evaluation.trees = {
                column: {} if folder is None else folder.trees(column) for column in evaluation.columns
            }
            sampler = sampler_of(evaluation)
        seconds = {column: sample_column(evaluation, sampler, column, folder) for column in evaluation.columns}
        results = scored(evaluation, seconds)
        if folder is not None:
            folder.write_results(results)
    print(results_table(results))


def prepared(
    arguments: EvalArguments, engine: EngineArguments, options: SamplingOptions, config: TreeSamplingConfig
) -> Evaluation:
    """
    Everything checked and read but the model.

    Raises:
        ValueError: saying what was set, what is allowed and what to do.
    """
    ks = checked_ks(arguments, engine, options, config)
    tokenizer = load_tokenizer(engine)
    adapters = arguments.adapters or []
    labels = labels_of(adapters)
    check_adapters(engine, adapters)
    eval_set = load_eval_set(arguments)
    scorers = make_scorers(arguments.reward_funcs, eval_set, config)
    template = arguments.chat_template_kwargs
    assert template is None or isinstance(template, dict), "parsed in __post_init__"
    prompt_ids = prompt_token_ids(eval_set.prompts, tokenizer, template)
    columns = ({"base": None} if arguments.base else {}) | {label: i for i, label in enumerate(labels)}
    return Evaluation(arguments, engine, options, config, tokenizer, ks, eval_set, scorers, prompt_ids, dict(columns))


def settings_of(evaluation: Evaluation) -> dict[str, object]:
    """What the samples of a folder depend on, beside the adapters and the prompts."""
    engine = evaluation.engine
    return {
        "model_name_or_path": engine.model_name_or_path,
        "model_revision": engine.model_revision,
        "dtype": engine.dtype,
        "vllm_quantization": engine.vllm_quantization,
        "completions": evaluation.arguments.completions,
        **asdict(evaluation.options),
        **asdict(evaluation.config),
    }


def sampler_of(evaluation: Evaluation) -> TreeSampler | None:
    """The sampler over an engine with the model loaded; `None` if no sample is missing."""
    missing = [column for column in evaluation.columns if evaluation.remaining(column)]
    if not missing:
        return None
    num_done = sum(map(len, evaluation.trees.values()))
    if num_done:
        total = len(evaluation.columns) * len(evaluation.prompt_ids)
        print(f"{num_done} of {total} prompts are in {evaluation.arguments.output} already.", file=sys.stderr)
    seed = evaluation.arguments.seed + num_done  # a resumed run does not repeat its first draws
    sampler = build_sampler(
        evaluation.engine,
        evaluation.options,
        evaluation.config,
        evaluation.tokenizer,
        seed,
        evaluation.arguments.adapters or [],
    )
    sampler.check(evaluation.prompt_ids)
    return sampler


def sample_column(
    evaluation: Evaluation, sampler: TreeSampler | None, column: str, folder: EvalFolder | None
) -> float:
    """Sample and write what a column lacks; returns the seconds."""
    prompts, trees = evaluation.remaining(column), evaluation.trees[column]
    if not prompts:
        return 0.0
    assert sampler is not None, "it is there if a prompt is missing"
    indices, token_ids = list(prompts), list(prompts.values())

    def keep(position: int, tree: SegmentTree) -> None:
        trees[indices[position]] = tree
        if folder is not None:
            folder.write(column, indices[position], tree, evaluation.tokenizer)

    started = time.perf_counter()
    use_adapter(sampler.engine, evaluation.arguments.adapters or [], evaluation.columns[column])
    with progress_bar(len(prompts) * sampler.config.num_generations, column) as on_leaves:
        if evaluation.arguments.completions == "trees":
            seed = f"{evaluation.arguments.seed}/{column}"
            sampler.sample(token_ids, seed, on_leaves=on_leaves, on_tree=keep)
        else:
            sample_independent(sampler.engine, token_ids, sampler.config, on_leaves, keep)
    return time.perf_counter() - started


def scored(evaluation: Evaluation, seconds: Mapping[str, float]) -> dict[str, object]:
    """Results of all columns, as results.json has them."""
    decode = evaluation.tokenizer.decode
    values = {}
    for column, trees in evaluation.trees.items():
        in_order = [trees[i] for i in range(len(evaluation.prompt_ids))]
        texts = [
            [str(decode(tree.completion_ids(leaf), skip_special_tokens=True)) for leaf in tree.leaves]
            for tree in in_order
        ]
        values[column] = prompt_values(
            Samples(in_order, texts),
            evaluation.scorers,
            evaluation.ks,
            evaluation.config.num_generations,
            with_majority=evaluation.eval_set.answer_of is not None,
        )
    adapters = evaluation.arguments.adapters or []
    names = {column: None if i is None else adapters[i] for column, i in evaluation.columns.items()}
    about = {"dataset_name": evaluation.arguments.dataset_name, "settings": settings_of(evaluation)}
    with user_errors():
        return results_of(values, names, seconds, about)
