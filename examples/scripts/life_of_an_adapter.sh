#!/usr/bin/env bash
# The life of an adapter on SmolLM2-135M: taught by examples, then by rewards; looked at; taken home as one model.
#
#     bash examples/scripts/life_of_an_adapter.sh FOLDER
#
# FOLDER must not exist. STEPS is the number of steps of each training (20).
# Further words are options of both trainings: `--use_cpu true --bf16 false` on a machine without a GPU.
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)
folder=$1
shift
mkdir "$folder"
cd "$folder"
steps=${STEPS:-20}
export HF_HUB_DISABLE_TELEMETRY=1

# Examples: TRL's SFTTrainer makes the adapter `sft`.
python "$scripts/sft_adapter.py" --model_folder "${MODEL:-model}" --output_dir sft --max_steps "$steps" \
  --per_device_train_batch_size 8 --learning_rate 2e-4 --save_strategy no --report_to none --logging_steps 1 "$@"

# Rewards: TreePOTrainer goes on from it. The base is the adapter's, and the reference of `beta` is the SFT policy.
treepo-trl train --adapter_name_or_path sft --dataset_name tasks.jsonl --output_dir rl --max_steps "$steps" \
  --reward_funcs "${REWARD:-treepo_trl.quickstart.answer_reward}" --beta 0.01 --learning_rate 1e-4 --log_trees true \
  --per_device_train_batch_size "${BATCH:-64}" --num_generations 8 --max_completion_length 32 --segment_length 8 \
  --dtype float32 --gradient_checkpointing false --save_strategy no --report_to none --logging_steps 1 "$@"

# Is it better: the base, the adapter of the examples and that of the rewards side by side.
treepo-trl eval --model_name_or_path "${MODEL:-model}" --adapters sft rl --dataset_name addition --output eval \
  --max_prompts "${PROMPTS:-64}" --num_generations 4 --max_completion_length 32

# What it sampled, as a page for a browser.
treepo-trl view rl --out trees.html

# One model, for transformers, vLLM and Ollama, in the base's number type or DTYPE.
treepo-trl export rl --out merged --dtype "${DTYPE:-auto}"
