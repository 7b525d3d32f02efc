"""
What `treepo-trl eval` takes beyond sampling: its seconds against plain vLLM generation of the same samples.

    python -m benchmarks.evaluate                                  # SmolLM2-135M on the packaged additions
    python -m benchmarks.evaluate --prompts 8 --repeats 1          # a quick look

Both sides run on one engine in one process, in turn, after a warm-up. Plain is `vllm.LLM.generate` with `n` and the
same drawing. `eval` samples, writes each prompt, decodes, scores, and computes the table with its intervals. Loading
the model is in neither. Lengths differ from run to run, so seconds per 1000 sampled tokens are compared. Prints a
Markdown table with medians of the repeats.
"""

import statistics
import time
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from benchmarks.common import device_name, make_parser, small_model_folder
from treepo_trl.commands.engine import EngineArguments
from treepo_trl.commands.eval import Evaluation, evaluated, prepared, sampler_of, settings_of
from treepo_trl.commands.evaluation.arguments import EvalArguments
from treepo_trl.commands.evaluation.output import opened_folder
from treepo_trl.commands.evaluation.table import results_table
from treepo_trl.engines import SamplingOptions
from treepo_trl.sampling import TreeSampler, TreeSamplingConfig


if TYPE_CHECKING:
    from treepo_trl.engines.vllm import VLLMEngine

Measured = tuple[float, int]
"""Seconds and sampled tokens."""


def evaluation_of(args: Namespace, folder: str) -> Evaluation:
    """An evaluation of the packaged additions that writes to `folder`."""
    return prepared(
        EvalArguments(dataset_name="addition", max_prompts=args.prompts, output=folder),
        EngineArguments(
            args.model or small_model_folder(), engine="vllm", dtype="bfloat16", vllm_max_model_length=512
        ),
        SamplingOptions(),
        TreeSamplingConfig(num_generations=args.samples, max_completion_length=args.length),
    )


def plain(evaluation: Evaluation, sampler: TreeSampler) -> Measured:
    """`LLM.generate` alone."""
    from vllm import SamplingParams

    llm = cast("VLLMEngine", sampler.engine).llm
    llm.reset_prefix_cache()
    config = sampler.config
    params = SamplingParams(
        n=config.num_generations, max_tokens=config.max_completion_length, temperature=1.0, logprobs=0
    )
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in evaluation.prompt_ids], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return seconds, sum(len(completion.token_ids) for output in outputs for completion in output.outputs)


def whole(evaluation: Evaluation, sampler: TreeSampler) -> Measured:
    """All of `treepo-trl eval` behind the loading of the model."""
    sampler.engine.reset_prefix_cache()
    started = time.perf_counter()
    with opened_folder(evaluation.arguments, settings_of(evaluation), evaluation.prompt_ids) as folder:
        results = evaluated(evaluation, sampler, folder)
    results_table(results)
    seconds = time.perf_counter() - started
    mean_length = cast(Any, results)["columns"]["base"]["metrics"]["tokens"]["value"]
    return seconds, round(mean_length * len(evaluation.prompt_ids) * sampler.config.num_generations)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    measured: dict[str, list[Measured]] = {"vLLM alone": [], "treepo-trl eval": []}
    with TemporaryDirectory() as scratch:
        first = evaluation_of(args, str(Path(scratch) / "0"))
        sampler = sampler_of(first, None)
        assert sampler is not None
        plain(first, sampler)
        for repeat in range(1, args.repeats + 1):
            evaluation = evaluation_of(args, str(Path(scratch) / str(repeat)))
            measured["vLLM alone"].append(plain(evaluation, sampler))
            measured["treepo-trl eval"].append(whole(evaluation, sampler))
    print(f"{args.prompts} prompts x {args.samples} samples of at most {args.length} tokens, {device_name()}")
    print("| | s | tokens | s / 1000 tokens |\n|---|---|---|---|")
    rates = {}
    for side, runs in measured.items():
        rates[side] = statistics.median(1000 * seconds / tokens for seconds, tokens in runs)
        seconds, tokens = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {side} | {seconds:.2f} | {tokens:.0f} | {rates[side]:.3f} |")
    ratios = [
        (own[0] / own[1]) / (alone[0] / alone[1])
        for alone, own in zip(measured["vLLM alone"], measured["treepo-trl eval"], strict=True)
    ]
    print(f"ratio per 1000 tokens: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
