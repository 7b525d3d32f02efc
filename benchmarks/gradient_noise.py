"""
Noise of the policy gradient of SmolLM2-135M-Instruct: within a prompt, between prompts, by baseline and group width.

    python -m benchmarks.gradient_noise                              # three families; half an hour on a core
    python -m benchmarks.gradient_noise --families addition --prompts 2  # a quick look

For each prompt, independent completions at temperature 1, and the gradient of each one's log-probability in the
weights of a fresh LoRA adapter: what the first step of a training sees. Groups of each width are drawn from them, all
disjoint. Everything follows from the inner products of these gradients: the variance of a group's estimate, and from
products of disjoint groups the squared mean, without bias. A random part of the coordinates stands for all.

`k x (within + between)` is the noise of a batch per decoded token, over that of groups of 16 with the mean of the
others as baseline.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import reasoning_gym
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import OUTPUTS, make_parser, small_model_folder, table_head, table_row
from treepo_trl import TreeSampler, TreeSamplingConfig
from treepo_trl.engines.transformers import TransformersEngine
from treepo_trl.quickstart import addition_tasks, answer_reward


MAX_TOKENS, COORDINATES = 40, 2**16
WIDTHS = (2, 4, 8, 16)


def additions(count: int) -> Dataset:
    """The quickstart's sums of three numbers."""
    return addition_tasks(count, 1, 5)[0]


def worked(name: str, example: tuple[str, str], **options: int) -> Callable[[int], Dataset]:
    """Tasks of reasoning-gym with one worked example in the prompt."""

    def tasks(count: int) -> Dataset:
        entries = reasoning_gym.create_dataset(name, size=count, seed=5, **options)
        turns = [{"role": "user", "content": example[0]}, {"role": "assistant", "content": example[1]}]
        prompts = [[*turns, {"role": "user", "content": each["metadata"]["expression"].strip()}] for each in entries]
        return Dataset.from_dict({"prompt": prompts, "answer": [each["answer"] for each in entries]})

    return tasks


FAMILIES: dict[str, Callable[[int], Dataset]] = {
    "addition": additions,
    "chain_sum": worked(
        "chain_sum",
        ("31 + 25", "30 + 20 = 50, 1 + 5 = 6, 50 + 6 = 56"),
        min_terms=2,
        max_terms=2,
        min_digits=2,
        max_digits=2,
    ),
    "products": worked("products", ("3 * 4", "3 + 3 + 3 + 3 = 12"), min_terms=2, max_terms=2, max_digits=1),
}


@dataclass
class Completions:
    """P prompts with K completions each."""

    rewards: torch.Tensor
    """`(P, K)`"""
    unsure: torch.Tensor
    """`(P, K)`: sum of 1 - p over the sampled tokens."""
    lengths: torch.Tensor
    """`(P, K)`: tokens."""
    products: torch.Tensor
    """`(P, K, P, K)`: inner products of the gradients of their log-probabilities."""


def measured(family: str, num_prompts: int, num_completions: int) -> Completions:
    """Sample, score, and go backward once per completion."""
    torch.manual_seed(0)
    path = small_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    data = FAMILIES[family](num_prompts)
    encoded = tokenizer.apply_chat_template(list(data["prompt"]), add_generation_prompt=True, return_dict=True)
    eos = [tokenizer.eos_token_id]
    config = TreeSamplingConfig(
        num_generations=num_completions,
        max_completion_length=MAX_TOKENS,
        segment_length=MAX_TOKENS,
        branching_factor=1,
        stop_repetition=False,
    )
    trees = TreeSampler(TransformersEngine(model, eos), config, eos).sample(encoded["input_ids"], seed=0)
    rows = [
        (tree.prompt_ids, tree.completion_ids(leaf), tree.logprobs(leaf)) for tree in trees for leaf in tree.leaves
    ]
    answers = [answer for answer in data["answer"] for _ in range(num_completions)]
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for _, ids, _ in rows]
    scores = torch.stack(list(gradients(model, rows)))
    shape = num_prompts, num_completions
    return Completions(
        torch.tensor(answer_reward(texts, answers)).view(shape),
        torch.tensor([sum(1 - torch.tensor(logprobs).exp()) for _, _, logprobs in rows]).view(shape),
        torch.tensor([float(len(ids)) for _, ids, _ in rows]).view(shape),
        (scores @ scores.T).view(*shape, *shape),
    )


def gradients(model: PeftModel, rows: list[tuple[list[int], list[int], list[float]]]) -> Iterator[torch.Tensor]:
    """A random part of the gradient of each row's log-probability, with squared norms that are right in the mean."""
    # The second matrix of a fresh adapter is zero, so the first has no gradient yet.
    weights = [p for name, p in model.named_parameters() if "lora_B" in name]
    total = sum(weight.numel() for weight in weights)
    kept = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:COORDINATES]
    for prompt, completion, _ in rows:
        ids = torch.tensor([prompt + completion])
        logits = model(ids, use_cache=False, logits_to_keep=len(completion) + 1).logits[0, :-1].float()
        logprob = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()
        flat = torch.cat([each.flatten() for each in torch.autograd.grad(logprob, weights)])
        yield flat[kept].float() * (total / COORDINATES) ** 0.5


def baselines(data: Completions, prompt: int, group: list[int]) -> dict[str, torch.Tensor]:
    """What each completion's reward is compared with, from the others of its group."""
    r = data.rewards[prompt, group]
    norms = data.products[prompt, group, prompt, group]
    weights = {
        "mean of the others": torch.ones_like(r),
        "by length": data.lengths[prompt, group],
        "by sum (1 - p)": data.unsure[prompt, group],
        "by squared norm": norms,
    }
    found = {name: ((w * r).sum() - w * r) / (w.sum() - w).clamp_min(1e-9) for name, w in weights.items()}
    return found | {"half of the mean": found["mean of the others"] / 2, "none": torch.zeros_like(r)}


@dataclass
class Noise:
    """Of the estimate of one group, summed over coordinates."""

    within: float
    between: float
    signal: float
    """Squared norm of the mean over prompts."""


def noise(data: Completions, baseline: str, width: int, shuffles: int = 20) -> Noise:
    """Variance of a group's estimate, split by products of groups that share nothing."""
    num_prompts, num = data.rewards.shape
    own: list[float] = []
    same: list[float] = []
    means = torch.zeros(num_prompts, num)
    for prompt in range(num_prompts):
        gram = data.products[prompt, :, prompt]
        for shuffle in range(shuffles):
            order = random.Random(f"{prompt}/{shuffle}").sample(range(num), num)
            groups = [order[i : i + width] for i in range(0, num - width + 1, width)]
            parts = torch.zeros(len(groups), num)
            for part, group in zip(parts, groups, strict=True):
                part[group] = (data.rewards[prompt, group] - baselines(data, prompt, group)[baseline]) / width
            products = parts @ gram @ parts.T
            own.append(products.diagonal().mean().item())
            same.append(((products.sum() - products.trace()) / (len(groups) * (len(groups) - 1))).item())
            means[prompt] += parts.mean(0) / shuffles
    between_prompts = torch.einsum("pk,pkql,ql->pq", means, data.products, means)
    pairs = num_prompts * (num_prompts - 1)
    signal = ((between_prompts.sum() - between_prompts.trace()) / pairs).item()
    within, of_prompts = sum(own) / len(own), sum(same) / len(same)
    return Noise(within - of_prompts, of_prompts - signal, signal)


def print_tables(family: str, data: Completions) -> None:
    """What the completions are like, and the noise of every baseline and width."""
    if data.rewards.min() == data.rewards.max():
        print(f"\n`{family}`: every completion has the reward {data.rewards.mean():.0f}, so there is no gradient.")
        return
    norms = torch.einsum("pkpk->pk", data.products)
    right = data.rewards > 0
    if data.rewards.shape[1] < 2 * max(WIDTHS):
        print(f"\n`{family}`: groups of {max(WIDTHS)} need {2 * max(WIDTHS)} completions; give `--completions`.")
        return
    reference = noise(data, "mean of the others", 16)
    print(
        f"\n`{family}`: {data.rewards.shape[0]} prompts x {data.rewards.shape[1]}, reward {data.rewards.mean():.2f}; "
    )
    print(
        f"wrong over right: squared norm {norms[~right].mean() / norms[right].mean():.2f}, "
        f"sum (1 - p) {data.unsure[~right].mean() / data.unsure[right].mean():.2f}, "
        f"tokens {data.lengths[~right].mean() / data.lengths[right].mean():.2f}; "
        f"within a completion over between prompts {16 * reference.within / max(reference.between, 1e-9):.1f}, "
        f"over the squared mean {16 * reference.within / max(reference.signal, 1e-9):.0f}\n"
    )
    per_token = 16 * (reference.within + reference.between)
    print(table_head("baseline", *(f"{width} completions" for width in WIDTHS)))
    for baseline in (
        "mean of the others",
        "by length",
        "by sum (1 - p)",
        "by squared norm",
        "half of the mean",
        "none",
    ):
        cells = [noise(data, baseline, width) for width in WIDTHS]
        row = [width * (each.within + each.between) / per_token for width, each in zip(WIDTHS, cells, strict=True)]
        print(table_row(baseline, *(f"{value:.2f}" for value in row)), flush=True)


def main() -> None:
    """Measure what is missing, and print a table per family."""
    parser = make_parser(__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=32)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "gradient_noise")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for family in options.families:
        file = options.out / f"{family}-{options.prompts}-{options.completions}.pt"
        if not file.exists():
            torch.save(vars(measured(family, options.prompts, options.completions)), file)
        print_tables(family, Completions(**torch.load(file)))


if __name__ == "__main__":
    main()
