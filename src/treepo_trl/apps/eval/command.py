"""`treepo-trl eval`: mean@k, pass@k and maj@k of a model and its adapters, side by side."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

from treepo_trl.apps.sample.command import advice_to_resume, build_sampler, progress_bar
from treepo_trl.apps.sample.cost_table import sample_independent
from treepo_trl.command_line.arguments import OptionsParser, options_parser
from treepo_trl.command_line.engine import load_tokenizer, use_adapter
from treepo_trl.command_line.engine_arguments import EngineArguments
from treepo_trl.command_line.errors import user_errors
from treepo_trl.command_line.prompts import prompt_token_ids
from treepo_trl.engines import SamplingOptions
from treepo_trl.sampling import SegmentTree, TreeSampler, TreeSamplingConfig

from .adapters import check_adapters, labels_of, tell_of_tokenizers
from .arguments import EvalArguments, checked_ks
from .data import EvalSet, load_eval_set
from .output import EvalFolder, opened_folder
from .scores import Scorer, make_scorers, prompt_values
from .table import results_of, results_table


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


def command_parser() -> OptionsParser:
    """The options of `treepo-trl eval`."""
    return options_parser("eval", EvalArguments, EngineArguments, SamplingOptions, TreeSamplingConfig)


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl eval`."""
    with ExitStack() as stack:
        with user_errors():
            evaluation = prepared(*command_parser().parse_args_and_config(argv))
            output = evaluation.arguments.output
            stack.enter_context(advice_to_resume(output, can_resume=output is not None))
            folder = stack.enter_context(
                opened_folder(evaluation.arguments, settings_of(evaluation), evaluation.prompt_ids)
            )
            sampler = sampler_of(evaluation, folder)
        results = evaluated(evaluation, sampler, folder)
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
    tell_of_tokenizers(engine, adapters, tokenizer)
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


def sampler_of(evaluation: Evaluation, folder: EvalFolder | None) -> TreeSampler | None:
    """The sampler over an engine with the model loaded; `None` if no sample is missing."""
    arguments, total = evaluation.arguments, len(evaluation.columns) * len(evaluation.prompt_ids)
    num_done = 0 if folder is None else sum(len(file.done) for file in folder.files.values())
    if num_done:
        print(f"{num_done} of {total} prompts are in {arguments.output} already.", file=sys.stderr)
    if num_done == total:
        return None
    sampler = build_sampler(
        evaluation.engine,
        evaluation.options,
        evaluation.config,
        evaluation.tokenizer,
        arguments.seed + num_done,  # a resumed run does not repeat its first draws
        arguments.adapters or [],
    )
    sampler.check(evaluation.prompt_ids)
    return sampler


def evaluated(evaluation: Evaluation, sampler: TreeSampler | None, folder: EvalFolder | None) -> dict[str, object]:
    """Sample, write and score a column after the other; returns the results, as results.json has them."""
    # The trees of one column at a time are kept: those of all of them may be more than the memory.
    values = {
        column: scored(evaluation, sampled_column(evaluation, sampler, column, folder))
        for column in evaluation.columns
    }
    adapters = evaluation.arguments.adapters or []
    names = {column: None if i is None else adapters[i] for column, i in evaluation.columns.items()}
    about = {"dataset_name": evaluation.arguments.dataset_name, "settings": settings_of(evaluation)}
    with user_errors():
        results = results_of(values, names, about)
    if folder is not None:
        folder.write_results(results)
    return results


def sampled_column(
    evaluation: Evaluation, sampler: TreeSampler | None, column: str, folder: EvalFolder | None
) -> list[SegmentTree]:
    """The trees of a column, one for each prompt; those that its file lacks are sampled and written."""
    trees = {} if folder is None else folder.trees(column)
    missing = [i for i in range(len(evaluation.prompt_ids)) if i not in trees]

    def keep(position: int, tree: SegmentTree) -> None:
        trees[missing[position]] = tree
        if folder is not None:
            folder.files[column].write(missing[position], tree, evaluation.tokenizer)

    if missing:
        assert sampler is not None, "it is there if a prompt is missing"
        arguments, prompts = evaluation.arguments, [evaluation.prompt_ids[i] for i in missing]
        use_adapter(sampler.engine, arguments.adapters or [], evaluation.columns[column])
        with progress_bar(len(prompts) * sampler.config.num_generations, column) as on_leaves:
            if arguments.completions == "trees":
                sampler.sample(prompts, f"{arguments.seed}/{column}", on_leaves=on_leaves, on_tree=keep)
            else:
                sample_independent(sampler.engine, prompts, sampler.config, on_leaves, keep)
    return [trees[i] for i in range(len(evaluation.prompt_ids))]


def scored(evaluation: Evaluation, trees: list[SegmentTree]) -> list[dict[str, float] | None]:
    """What is averaged over prompts, for each prompt."""
    decode = evaluation.tokenizer.decode
    texts = [
        [str(decode(tree.completion_ids(leaf), skip_special_tokens=True)) for leaf in tree.leaves] for tree in trees
    ]
    with_majority = evaluation.eval_set.answer_of is not None
    num_samples = evaluation.config.num_generations
    return prompt_values(trees, texts, evaluation.scorers, evaluation.ks, num_samples, with_majority)
