"""
How far vLLM is from the policy in each number type, in nats per token: SmolLM2-135M-Instruct, a moved LoRA adapter.

    python -m benchmarks.number_types --dtype float16    # one type per process; CPU or GPU
    python -m benchmarks.number_types --speculation ngram --prompt numbers           # vLLM guesses tokens
    python -m benchmarks.number_types --speculation ngram --prompt numbers --faulty  # with its fault on a processor

The figures are those of the probe that a training makes at its start: 4 prompts with 32 sampled tokens each, the same
adapter in both. Prints a row of a Markdown table.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.report.stages.speculation import PROMPT
from benchmarks.rollout import speculation
from treepo_trl.engines.vllm import VLLMEngine
from treepo_trl.policy.adapter_probe import probe_adapter, segments_of
from treepo_trl.policy.engine_check import bound_of
from treepo_trl.quickstart import addition_tasks, small_model


def main() -> None:
    """Probe once and print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--model_folder", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speculation", choices=["ngram", "suffix"], help="vLLM guesses tokens")
    parser.add_argument("--faulty", action="store_true", help="on a processor, with temperatures that nobody writes")
    parser.add_argument("--prompt", default="sums", choices=["sums", "numbers"], help="numbers: answers that repeat")
    parser.add_argument("--out", type=Path, default=Path("outputs/number_types"))
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, as in a training
    import vllm
    from vllm.lora.request import LoRARequest

    folder = small_model(args.model_folder)
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    with speculation(args.speculation, is_mended=not args.faulty):
        llm = vllm.LLM(
            folder,
            dtype=args.dtype,
            enable_lora=True,
            max_lora_rank=16,
            max_model_len=512,
            gpu_memory_utilization=0.2,
            logprobs_mode="processed_logprobs",
            enforce_eager=True,
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks, _ = addition_tasks(8, 1, args.seed)
    asked = tasks["prompt"] if args.prompt == "sums" else [PROMPT]
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in asked]
    prompts = list(tokenizer((4 * sorted(set(texts)))[:4], add_special_tokens=False)["input_ids"])
    request = LoRARequest("policy", 1, str(args.out))

    def sync() -> None:
        model.save_pretrained(args.out)
        llm.llm_engine.add_lora(LoRARequest("policy", 1, str(args.out), load_inplace=True))
        llm.reset_prefix_cache()

    started = time.perf_counter()
    found = probe_adapter(
        model,
        sync,
        lambda wanted: segments_of(VLLMEngine(llm, [], lora_request=request), wanted),
        prompts,
        bound=bound_of(dtype),
        seed=args.seed,
    )
    seconds = time.perf_counter() - started
    cause = found.cause or "none"
    print(
        f"| {args.dtype} | {found.before:.5f} | {found.moved:.5f} | {found.movement:.3f} | {cause} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
