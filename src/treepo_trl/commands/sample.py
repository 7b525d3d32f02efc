"""`treepo-trl sample`: trees of completions for a dataset, a file or standard input, without any training."""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

from trl import TrlParser

from treepo_trl.engines import SamplingOptions
from treepo_trl.sampling.config import TreeSamplingConfig, check_choice, check_int
from treepo_trl.sampling.sampler import TreeSampler
from treepo_trl.sampling.tree import SegmentTree

from .cost_table import RolloutReport, format_table, report, sample_independent
from .engine import EngineArguments, build_engine, eos_token_ids, load_tokenizer
from .errors import user_errors
from .prompts import load_named_dataset, prompt_token_ids, read_prompts, take_split


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
            Column of the prompts, text or messages; the key in JSON on standard input. Default: `prompt`, or the only
            column.
        max_prompts (`int`, *optional*):
            Number of prompts, from the first on. Default: all.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the chat template, as in `GRPOConfig`; JSON on the command line.
        output (`str`, *optional*):
            JSONL file for the trees, one per line as they are done; a missing folder is made. Default: none.
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
            With `compare`: how often to sample both, in turn, after a warm-up; medians are printed.
    """

    dataset_name: str = field(default="-", metadata={"help": "Hub id, file, folder, or - for standard input."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to take the prompts from."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompts, text or messages."})
    max_prompts: int | None = field(default=None, metadata={"help": "Number of prompts, from the first on."})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": """Arguments of the chat template, such as '{"enable_thinking": false}'."""}
    )
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
        check_int("repeats", self.repeats)
        if self.max_prompts is not None:
            check_int("max_prompts", self.max_prompts)
        for name, valid, allowed in (
            ("max_prompts", self.max_prompts is None or self.max_prompts >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)"),
            ("top_k", self.top_k >= -1, "0 or -1 (all tokens) or more"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 (all tokens) and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
            ("repeats", self.repeats >= 1, "at least 1"),
        ):
            if not valid:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be {allowed}.")
        if self.compare is not None:
            check_choice("compare", self.compare, Literal["independent"])
        if self.compare is not None and self.resume:
            raise ValueError("`--compare` times all prompts and `--resume` leaves some out. Choose one of them.")
        if isinstance(self.chat_template_kwargs, str):
            with suppress(json.JSONDecodeError):
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(
                f"`chat_template_kwargs` is {self.chat_template_kwargs!r}; give a JSON object such as "
                """'{"enable_thinking": false}'."""
            )


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl sample`."""
    with user_errors():
        dataclass_types: Any = (SampleArguments, EngineArguments, TreeSamplingConfig)
        parser = TrlParser(dataclass_types, prog="treepo-trl sample")
        arguments, engine_arguments, config = parser.parse_args_and_config(argv, fail_with_unknown_args=True)
        tokenizer = load_tokenizer(engine_arguments)
        prompts = prompt_token_ids(load_prompts(arguments), tokenizer, arguments.chat_template_kwargs)
        done = finished_prompts(arguments, prompts)
        if done:
            print(f"{len(done)} of {len(prompts)} trees are in {arguments.output} already.", file=sys.stderr)
        remaining = [i for i in range(len(prompts)) if i not in done]
        if not remaining:
            return
        eos_ids = eos_token_ids(engine_arguments, tokenizer)
        options = SamplingOptions(
            arguments.temperature, arguments.top_p, arguments.top_k, arguments.min_p, arguments.repetition_penalty
        )
        with_entropies = config.branching_policy == "entropy"
        seed = arguments.seed + len(done)  # a resumed run does not repeat its first draws
        engine = build_engine(engine_arguments, eos_ids, options, with_entropies, seed)
        # Cleaning up would take characters away again that earlier segments have shown.
        decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        sampler = TreeSampler(engine, config, eos_ids, decode)
        sampler.check(prompts)
    trees, reports = run(arguments, sampler, tokenizer, [prompts[i] for i in remaining], remaining)
    if arguments.output is None:
        print(format_tree(trees[0], tokenizer))
    print(format_table(reports))
    if arguments.compare and (config.stop_pattern is not None or config.stop_repetition):
        print(
            "`stop_pattern` and `stop_repetition` end paths of trees early and no ordinary completion: part of the "
            "ratio may be theirs. `--stop_repetition false` compares sharing alone.",
            file=sys.stderr,
        )


def load_prompts(arguments: SampleArguments) -> list[Any]:
    """
    Prompts of the dataset, text or messages.

    Raises:
        ValueError: if the split or the column does not exist.
    """
    if arguments.dataset_name == "-":
        if sys.stdin.isatty():
            print("Type prompts, one per line, and end with Ctrl-D; or set `--dataset_name`.", file=sys.stderr)
        return read_prompts(sys.stdin, arguments.prompt_column or "prompt")[: arguments.max_prompts]
    splits = load_named_dataset(arguments.dataset_name, arguments.dataset_config, arguments.dataset_split)
    dataset = take_split(splits, arguments.dataset_split, "--dataset_split")
    columns = dataset.column_names
    column = arguments.prompt_column or ("prompt" if "prompt" in columns or len(columns) != 1 else columns[0])
    if column not in columns:
        raise ValueError(f"The dataset has no column {column!r}, only {', '.join(columns)}. Set `--prompt_column`.")
    return list(dataset[column][: arguments.max_prompts])


def finished_prompts(arguments: SampleArguments, prompts: list[list[int]]) -> set[int]:
    """
    Indices of the prompts whose trees the output file holds; a line that was cut off is removed from it.

    Makes the file and its folder if they are missing, so that a run does not fail at its first tree.

    Raises:
        ValueError: if the file holds anything and is not to be resumed, or holds something else than trees of these
            prompts.
    """
    if arguments.output is None:
        return set()
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    done: set[int] = set()
    with path.open("a+b") as file:
        file.seek(0)
        for line in iter(file.readline, b""):
            if not arguments.resume:
                raise ValueError(f"`--output {path}` exists already. Remove it, name another file, or add `--resume`.")
            if not line.endswith(b"\n") and line.startswith(_LINE_START[: len(line)]):
                file.truncate(file.tell() - len(line))  # a dying process did not finish it
                break
            done.add(_prompt_of_line(path, line, prompts))
    return done


_LINE_START = b'{"index": '  # as `write_tree` writes it


def _prompt_of_line(path: Path, line: bytes, prompts: list[list[int]]) -> int:
    try:
        record = json.loads(line)
        index, prompt_ids = record["index"], record["tree"]["prompt_ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`--output {path}` has a line that is no tree of this command: {line!r:.80}. Name another file."
        ) from error
    if index >= len(prompts) or prompt_ids != prompts[index]:
        raise ValueError(
            f"`--output {path}` holds a tree of another prompt {index}: it is from another run. Name another file."
        )
    return index


def run(
    arguments: SampleArguments, sampler: TreeSampler, tokenizer: Any, prompts: list[list[int]], indices: list[int]
) -> tuple[list[SegmentTree], dict[str, list[RolloutReport]]]:
    """Sample the trees, and ordinary completions in turn if asked for; returns trees and the reports of each way."""
    compare = arguments.compare is not None
    advice = "" if arguments.output is None or compare else f"`--resume` goes on from the trees in {arguments.output}."
    repeats = arguments.repeats if compare else 1
    trees: list[SegmentTree] = []
    reports: dict[str, list[RolloutReport]] = {"trees": []}
    file = open(arguments.output, "a", encoding="utf-8") if arguments.output else None  # noqa: SIM115 - closed below

    def write(index: int, tree: SegmentTree) -> None:
        if file is not None:
            write_tree(file, indices[index], tree, tokenizer)

    try:
        if compare:  # an engine's first steps take longer, and the trees come first
            sample_independent(sampler.engine, prompts[:1], sampler.config)
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
    except KeyboardInterrupt as interrupt:
        raise SystemExit(" ".join(["Interrupted.", *getattr(interrupt, "__notes__", []), advice]).rstrip()) from None
    except Exception as error:
        if advice:
            error.add_note(advice)
        raise
    finally:
        if file is not None:
            file.close()
    return trees, reports


def format_tree(tree: SegmentTree, tokenizer: Any) -> str:
    """The completions of a tree for reading: weight, why it ended, text."""
    lines = [f"Completions of {tokenizer.decode(tree.prompt_ids)!r} (weight, end, text):"]
    for leaf, weight in zip(tree.leaves, tree.leaf_weights(), strict=True):
        text = tokenizer.decode(tree.completion_ids(leaf), skip_special_tokens=True)
        lines.append(f"  {weight:.3f} {tree.nodes[leaf].finish_reason:10} {text!r}")
    return "\n".join([*lines, ""])


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
