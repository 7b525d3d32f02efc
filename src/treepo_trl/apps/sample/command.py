"""`treepo-trl sample`: trees of completions for a dataset, a file or standard input, without any training."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from treepo_trl.command_line.arguments import OptionsParser, SampleArguments, options_parser
from treepo_trl.command_line.engine import build_engine, eos_token_ids, load_tokenizer
from treepo_trl.command_line.engine_arguments import EngineArguments
from treepo_trl.command_line.errors import user_errors
from treepo_trl.command_line.prompts import load_prompts, prompt_token_ids
from treepo_trl.command_line.tree_file import OutputError, TreeFile, opened_output
from treepo_trl.engines import SamplingOptions
from treepo_trl.sampling import SegmentTree, TreeSampler, TreeSamplingConfig, text_decoder

from .cost_table import RolloutReport, format_table, report, sample_independent


def command_parser() -> OptionsParser:
    """The options of `treepo-trl sample`."""
    return options_parser("sample", SampleArguments, EngineArguments, SamplingOptions, TreeSamplingConfig)


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl sample`."""
    with ExitStack() as stack:
        with user_errors():
            arguments, engine_arguments, options, config = command_parser().parse_args_and_config(argv)
            can_resume = arguments.output is not None and arguments.compare is None
            stack.enter_context(advice_to_resume(arguments.output, can_resume))
            tokenizer = load_tokenizer(engine_arguments)
            prompts = prompt_token_ids(load_prompts(arguments), tokenizer, arguments.chat_template_kwargs)
            output = stack.enter_context(opened_output(arguments.output, arguments.resume, prompts))
            done = set[int]() if output is None else output.done
            if done:
                print(f"{len(done)} of {len(prompts)} trees are in {arguments.output} already.", file=sys.stderr)
            remaining = {index: prompt for index, prompt in enumerate(prompts) if index not in done}
            if not remaining:
                return
            seed = arguments.seed + len(done)  # a resumed run does not repeat its first draws
            sampler = build_sampler(engine_arguments, options, config, tokenizer, seed)
            sampler.check(prompts)
        trees, reports = run(arguments, sampler, tokenizer, remaining, output)
    if arguments.output is None:
        print(format_tree(trees[0], tokenizer))
    print(format_table(reports))
    if arguments.compare and (config.stop_pattern is not None or config.stop_repetition):
        print(
            "`stop_pattern` and `stop_repetition` end paths of trees early and no ordinary completion: part of the "
            "ratio may be theirs. `--stop_repetition false` compares sharing alone.",
            file=sys.stderr,
        )


def build_sampler(
    engine_arguments: EngineArguments,
    options: SamplingOptions,
    config: TreeSamplingConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    adapters: Sequence[str] = (),
) -> TreeSampler:
    """A sampler over an engine with the model loaded; `seed` and `adapters` are as in `build_engine`."""
    eos_ids = eos_token_ids(engine_arguments, tokenizer)
    with_entropies = config.branching_policy == "entropy"
    engine = build_engine(engine_arguments, eos_ids, options, with_entropies, seed, adapters)
    return TreeSampler(engine, config, eos_ids, text_decoder(tokenizer))


def run(
    arguments: SampleArguments,
    sampler: TreeSampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[int, list[int]],
    output: TreeFile | None,
) -> tuple[list[SegmentTree], dict[str, list[RolloutReport]]]:
    """
    Sample and write a tree for each prompt; with `--compare` sample ordinary completions too, in turn with trees.

    Args:
        prompts (`dict[int, list[int]]`):
            Token ids by the index of the prompt, which the output file names.

    Returns:
        Trees of the last round, and the reports of each way of sampling.
    """
    indices, token_ids = list(prompts), list(prompts.values())
    num_leaves = len(prompts) * sampler.config.num_generations
    trees: list[SegmentTree] = []
    reports: dict[str, list[RolloutReport]] = {"trees": []}

    def write(position: int, tree: SegmentTree) -> None:
        if output is not None:
            output.write(indices[position], tree, tokenizer)

    if arguments.compare:  # an engine's first steps take longer, and the trees come first
        sample_independent(sampler.engine, token_ids[:1], sampler.config)
    for repeat in range(arguments.repeats if arguments.compare else 1):
        sampler.engine.reset_prefix_cache()
        with progress_bar(num_leaves, "trees") as on_leaves:
            seed = f"{arguments.seed}/{repeat}"
            on_tree = write if repeat == 0 else None
            trees = sampler.sample(token_ids, seed, on_leaves=on_leaves, on_tree=on_tree)
        reports["trees"].append(report(trees, sampler.stats))
        if arguments.compare:
            sampler.engine.reset_prefix_cache()
            with progress_bar(num_leaves, "independent") as on_leaves:
                completions, stats = sample_independent(sampler.engine, token_ids, sampler.config, on_leaves)
            reports.setdefault("independent", []).append(report(completions, stats))
    return trees, reports


@contextmanager
def advice_to_resume(output: str | None, can_resume: bool) -> Iterator[None]:
    """Say how to go on where a run ends early: in one line after Ctrl-C or a full disk, as a note of other errors."""
    advice = f"`--resume` goes on from the trees in {output}." if can_resume else ""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise SystemExit(" ".join(["Interrupted.", *getattr(interrupt, "__notes__", []), advice]).rstrip()) from None
    except OutputError as error:
        raise SystemExit(f"treepo-trl: error: {error} {advice}".rstrip()) from error
    except Exception as error:
        if advice:
            error.add_note(advice)
        raise


def format_tree(tree: SegmentTree, tokenizer: PreTrainedTokenizerBase) -> str:
    """The completions of a tree for reading: weight, why it ended, text."""
    lines = [f"Completions of {tokenizer.decode(tree.prompt_ids)!r} (weight, end, text):"]
    for leaf, weight in zip(tree.leaves, tree.leaf_weights(), strict=True):
        text = tokenizer.decode(tree.completion_ids(leaf), skip_special_tokens=True)
        lines.append(f"  {weight:.3f} {tree.nodes[leaf].finish_reason:10} {text!r}")
    return "\n".join([*lines, ""])


@contextmanager
def progress_bar(num_leaves: int, name: str) -> Iterator[Callable[[int], None]]:
    """A bar over all leaves, on standard error; gives the function that counts more of them."""
    with tqdm(total=num_leaves, desc=name, unit="leaf") as bar:

        def count(num_new_leaves: int) -> None:
            bar.update(num_new_leaves)

        yield count
