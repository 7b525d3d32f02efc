#!/usr/bin/env bash
# A vLLM server with the flags that a training with LoRA asks of it. It answers to this machine alone.
#
#     CUDA_VISIBLE_DEVICES=0 bash examples/servers/serve.sh Qwen/Qwen2.5-1.5B-Instruct --port 8000
#
# Further flags are those of `vllm serve`: `--host 10.0.0.5` on a private network, `--max-lora-rank 64`.
set -euo pipefail
export VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
model=$1
shift
exec vllm serve "$model" --host 127.0.0.1 --enable-scale-out --enable-prefix-caching --enable-prompt-tokens-details \
  --logprobs-mode processed_logprobs --generation-config vllm --enable-lora --max-loras 2 --max-lora-rank 16 \
  --disable-uvicorn-access-log "$@"
