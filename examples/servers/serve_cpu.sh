#!/usr/bin/env bash
# A vLLM server on this processor, with SmolLM2-135M from a package or the model in $MODEL. It answers to this machine alone.
#
#     bash examples/servers/serve_cpu.sh --port 8000
#
# Further flags are those of vLLM: `--host 0.0.0.0` in a private network.
set -euo pipefail
export VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
model=${MODEL:-$(python -c "
from treepo_trl.quickstart.model import default_folder, small_model
print(small_model(default_folder()))")}
# `vllm serve` does not start with the package vllm-cpu, and this module starts with any.
exec python -m vllm.entrypoints.openai.api_server --model "$model" --host 127.0.0.1 --enable-scale-out \
  --enable-prefix-caching --enable-prompt-tokens-details --logprobs-mode processed_logprobs --generation-config vllm \
  --enable-lora --max-loras 2 --max-lora-rank 16 --disable-uvicorn-access-log --dtype float32 --max-model-len 512 \
  --max-num-seqs 64 --enforce-eager --block-size 32 "$@"
