"""Speculation on the narrow levels of one prompt's tree: seconds, and whether log-probabilities stay the policy's."""

from typing import Any

from benchmarks.report.cases import Case, Record, Stage


NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SUFFIX = {"method": "suffix", "num_speculative_tokens": 8}
PROMPT = [{"role": "user", "content": "Write the numbers from 1 to 200, each with its square, one per line."}]


def settings(speculation: dict[str, Any] | None, steps: int, is_toy: bool) -> dict[str, Any]:
    """Settings of the trainer: one tree of 16 leaves per step."""
    import torch

    from benchmarks.common import OUTPUTS, number_type

    dtype, precision = number_type()
    length, segment, longest = (16, 8, 128) if is_toy else (512, 64, 1024)
    return {
        "output_dir": str(OUTPUTS / "gpu_report/speculation"),
        "use_cpu": not torch.cuda.is_available(),
        **precision,
        "report_to": [],
        "save_strategy": "no",
        "learning_rate": 0.0,
        "logging_steps": 1,
        "max_steps": steps,
        "num_generations": 16,
        "per_device_train_batch_size": 16,
        "max_completion_length": length,
        "segment_length": segment,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": longest,
        "vllm_engine_kwargs": {"speculative_config": speculation} if speculation else {},
        "model_init_kwargs": {"dtype": dtype},
    }


def grow(record: Record, label: str, speculation: dict[str, Any] | None, steps: int, model: str | None = None) -> None:
    """
    Trees of one prompt, sampled by a trainer at temperature 1; a learning rate of zero keeps the policy as it is.

    Without a `model` it is SmolLM2-135M-Instruct.
    """
    from datasets import Dataset
    from peft import LoraConfig

    from benchmarks.common import seconds, small_model_folder
    from treepo_trl import TreePOConfig, TreePOTrainer

    args = TreePOConfig(**settings(speculation, steps, is_toy=model is not None))
    trainer = TreePOTrainer(
        model=model or small_model_folder(),
        args=args,
        reward_funcs=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * steps}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    generate, taken = trainer._generate, []

    def timed(*arguments: Any, **options: Any) -> Any:
        results: list[Any] = []
        taken.append(seconds(lambda: results.append(generate(*arguments, **options))))
        return results[0]

    trainer._generate = timed
    trainer.train()
    logs = [log for log in trainer.state.log_history if "tree/decoded_tokens" in log]
    for value, log in list(zip(taken, logs, strict=True))[1 if steps > 1 else 0 :]:
        record(f"{label}: decoded tokens/s", log["tree/decoded_tokens"] / value)
        record(f"{label}: trajectories/s", 16 / value)
        record(f"{label}: nats, mean", log["sampling/sampling_logp_difference/mean"])


def cases(smoke: bool) -> list[Case]:
    """Without speculation, and with both kinds. At toy size without: vLLM first compiles its n-grams."""
    if smoke:
        return [Case("none", grow, {"label": "none", "speculation": None, "steps": 1}, "tiny")]
    kinds = {"none": None, "n-gram": NGRAM, "suffix": SUFFIX}
    return [Case(name, grow, {"label": name, "speculation": kind, "steps": 6}) for name, kind in kinds.items()]


SPECULATION = Stage(
    name="speculation",
    title="Speculation on one prompt's tree",
    about="""\
One prompt, 16 leaves of at most 512 tokens, SmolLM2-135M-Instruct. vLLM guesses tokens by n-grams, or by suffixes
(which needs `arctic-inference`). Nats are between engine and policy, and must stay what they are without.""",
    cases=cases,
)
