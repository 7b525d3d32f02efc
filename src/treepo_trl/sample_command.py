"""`treepo-trl sample`: trees of completions for a dataset, a file or standard input, without any training."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from trl import TrlParser

from .data import load_named_dataset, prompt_token_ids, read_prompts
from .engines import SamplingOptions
from .offline import (
    EngineArguments,
    RolloutReport,
    build_engine,
    eos_token_ids,
    format_table,
    load_tokenizer,
    report,
    sample_independent,
)
from .sampler import TreeSampler
from .sampling_config import TreeSamplingConfig
from .tree import SegmentTree


@dataclass
class SampleArguments:
    """
    What `treepo-trl sample` reads, draws and writes.

    Parameters:
        dataset_name (`str`, *optional*, defaults to `"-"`):
            Prompts: a dataset of the hub, a file (json, jsonl, csv, parquet, txt), a folder written by
            `Dataset.save_to_disk`, or `-` for standard input with a prompt per line.
        dataset_config (`str`, *optional*):
            Configuration of a hub dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to take the prompts from.
        prompt_column (`str`, *optional*):
            Column of the prompts, text or messages. Default: `prompt`, or the only column.
        max_prompts (`int`, *optional*):
            Number of prompts, from the first on. Default: all.
        output (`str`, *optional*):
            JSONL file for the trees, one per line as they are done. Default: none.
        resume (`bool`, *optional*, defaults to `False`):
            Keep the trees that `output` holds and sample the others.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits; 0 takes the most likely token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Smallest total probability of the tokens considered.
        top_k (`int`, *optional*, defaults to `0`):
            Number of tokens considered; 0 is all.
        min_p (`float`, *optional*):
            Smallest probability considered, as a fraction of the largest.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Penalty on tokens that occur in the prompt or the path; 1 is none.
        seed (`int`, *optional*, defaults to `0`):
            Seed of branching and of the engine.
        compare (`str`, *optional*):
            `"independent"` samples the same number of ordinary completions too and prints the ratios.
        repeats (`int`, *optional*, defaults to `3`):
            With `compare`: how often to sample both, in turn; medians are printed.
    """

    dataset_name: str = field(default="-", metadata={"help": "Hub id, file, folder, or - for standard input."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to take the prompts from."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompts, text or messages."})
    max_prompts: int | None = field(default=None, metadata={"help": "Number of prompts, from the first on."})
    output: str | None = field(default=None, metadata={"help": "JSONL file for the trees."})
    resume: bool = field(default=False, metadata={"help": "Keep the trees in the output file, sample the others."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits; 0 takes the most likely token."})
    top_p: float = field(default=1.0, metadata={"help": "Smallest total probability of the tokens considered."})
    top_k: int = field(default=0, metadata={"help": "Number of tokens considered; 0 is all."})
    min_p: float | None = field(default=None, metadata={"help": "Smallest probability, as a fraction of the largest."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Penalty on tokens that occurred; 1 is none."})
    seed: int = field(default=0, metadata={"help": "Seed of branching and of the engine."})
    compare: Literal["independent"] | None = field(
        default=None, metadata={"help": "Sample ordinary completions too and print the ratios."}
    )
    repeats: int = field(default=3, metadata={"help": "With --compare: how often to sample both, in turn."})

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"`temperature` is {self.temperature}; it must be 0 (greedy) or more.")
        for name, value in (("repeats", self.repeats), ("max_prompts", self.max_prompts)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        if self.compare is not None and self.resume:
            raise ValueError("`--compare` times all prompts and `--resume` leaves some out. Choose one of them.")


def main(argv: list[str], user_errors: Callable[[], AbstractContextManager[None]]) -> None:
    """
    Run the command with the arguments after `treepo-trl sample`.

    `user_errors` is the context in which errors in arguments, data and model names become one line.
    """
    with user_errors():
        dataclass_types: Any = (SampleArguments, EngineArguments, TreeSamplingConfig)
        parser = TrlParser(dataclass_types, prog="treepo-trl sample")
        arguments, engine_arguments, config = parser.parse_args_and_config(argv, fail_with_unknown_args=True)
        tokenizer = load_tokenizer(engine_arguments)
        prompts = prompt_token_ids(load_prompts(arguments), tokenizer)
        done = finished_prompts(arguments, prompts)
        eos_ids = eos_token_ids(engine_arguments, tokenizer)
        options = SamplingOptions(
            arguments.temperature, arguments.top_p, arguments.top_k, arguments.min_p, arguments.repetition_penalty
        )
        with_entropies = config.branching_policy == "entropy"
        engine = build_engine(engine_arguments, eos_ids, options, with_entropies, arguments.seed)
        sampler = TreeSampler(engine, config, eos_ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
        sampler.check(prompts)
    remaining = [i for i in range(len(prompts)) if i not in done]
    if done:
        print(f"{len(done)} of {len(prompts)} trees are in {arguments.output} already.", file=sys.stderr)
    if not remaining:
        return
    reports = run(arguments, sampler, tokenizer, [prompts[i] for i in remaining], remaining)
    print(format_table(reports))


def load_prompts(arguments: SampleArguments) -> list[Any]:
    """
    Prompts of the dataset, text or messages.

    Raises:
        ValueError: if the split or the column does not exist.
    """
    if arguments.dataset_name == "-":
        dataset: Any = read_prompts()
    else:
        splits = load_named_dataset(arguments.dataset_name, arguments.dataset_config, arguments.dataset_split)
        if arguments.dataset_split not in splits:
            raise ValueError(
                f"The dataset has no split {arguments.dataset_split!r}, only {', '.join(splits)}. "
                "Set `--dataset_split`."
            )
        dataset = splits[arguments.dataset_split]
    columns = dataset.column_names
    column = arguments.prompt_column or ("prompt" if "prompt" in columns or len(columns) != 1 else columns[0])
    if column not in columns:
        raise ValueError(f"The dataset has no column {column!r}, only {', '.join(columns)}. Set `--prompt_column`.")
    return list(dataset[column][: arguments.max_prompts])


def finished_prompts(arguments: SampleArguments, prompts: list[list[int]]) -> set[int]:
    """
    Indices of the prompts whose trees the output file holds; a line that was cut off is removed from it.

    Raises:
        ValueError: if the file exists and is not to be resumed, or holds trees of other prompts.
    """
    path = arguments.output
    if path is None or not os.path.exists(path) or os.path.getsize(path) == 0:
        return set()
    if not arguments.resume:
        raise ValueError(f"`--output {path}` exists already. Remove it, name another file, or add `--resume`.")
    done: set[int] = set()
    with open(path, "r+", encoding="utf-8") as file:
        while True:
            start = file.tell()
            line = file.readline()
            if not line.endswith("\n"):  # the end, or a line that a dying process did not finish
                file.truncate(start)
                break
            record = json.loads(line)
            index = record["index"]
            if index >= len(prompts) or record["tree"]["prompt_ids"] != prompts[index]:
                raise ValueError(f"`--output {path}` holds a tree of another prompt {index}: it is from another run.")
            done.add(index)
    return done


def run(
    arguments: SampleArguments, sampler: TreeSampler, tokenizer: Any, prompts: list[list[int]], indices: list[int]
) -> dict[str, list[RolloutReport]]:
    """Sample the trees, and ordinary completions in turn if asked for; returns the reports of each way."""
    compare = arguments.compare is not None
    repeats = arguments.repeats if compare else 1
    reports: dict[str, list[RolloutReport]] = {"trees": []}
    file = open(arguments.output, "a", encoding="utf-8") if arguments.output else None  # noqa: SIM115 - closed below

    def write(index: int, tree: SegmentTree) -> None:
        if file is not None:
            write_tree(file, indices[index], tree, tokenizer)

    try:
        for repeat in range(repeats):
            sampler.engine.reset_prefix_cache()
            with progress_bar(prompts, sampler.config, "trees") as bar:
                seed = f"{arguments.seed}/{repeat}"
                on_tree = write if repeat == 0 else None
                trees = sampler.sample(prompts, seed, on_leaves=bar.update, on_tree=on_tree)
            reports["trees"].append(report(trees, sampler.stats))
            if compare:
                sampler.engine.reset_prefix_cache()
                with progress_bar(prompts, sampler.config, "independent") as bar:
                    completions, stats = sample_independent(sampler.engine, prompts, sampler.config, bar.update)
                reports.setdefault("independent", []).append(report(completions, stats))
    except KeyboardInterrupt:
        if file is None:
            raise
        raise SystemExit(f"Interrupted. `--resume` goes on from the trees in {arguments.output}.") from None
    finally:
        if file is not None:
            file.close()
    return reports


def progress_bar(prompts: list[list[int]], config: TreeSamplingConfig, name: str) -> Any:
    """A bar over all leaves, on standard error."""
    from tqdm.auto import tqdm

    return tqdm(total=len(prompts) * config.num_generations, desc=name, unit="leaf")


def write_tree(file: TextIO, index: int, tree: SegmentTree, tokenizer: Any) -> None:
    """Append a tree as one JSON line: index and text of the prompt, texts and weights of the leaves, the tree."""
    record = {
        "index": index,
        "prompt": tokenizer.decode(tree.prompt_ids, skip_special_tokens=False),
        "completions": [tokenizer.decode(tree.completion_ids(leaf), skip_special_tokens=True) for leaf in tree.leaves],
        "weights": tree.leaf_weights(),
        "tree": tree.to_dict(),
    }
    file.write(json.dumps(record) + "\n")
    file.flush()
