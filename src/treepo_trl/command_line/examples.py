"""What `--help` of each command begins with."""

EXAMPLES = {
    "quickstart": """\
examples:
  treepo-trl quickstart                                                # two minutes on two CPU cores
  treepo-trl quickstart --seed 43 --output_dir outputs/another         # every setting of a training may be given
  treepo-trl quickstart --stock_grpo true --log_trees false            # the same with TRL's GRPOTrainer
""",
    "train": """\
examples:
  treepo-trl train --config examples/cli_configs/qwen2.5-1.5b-lora-12gb.yaml         # a recipe
  treepo-trl train --config recipe.yaml --learning_rate 1e-5 --output_dir outputs/b  # options override the file
  treepo-trl train --config recipe.yaml --adapter_name_or_path outputs/sft           # on from an adapter
""",
    "plan": """\
examples:
  treepo-trl plan --config examples/cli_configs/qwen2.5-1.5b-lora-12gb.yaml --card_gib 12   # for another machine
  treepo-trl plan --config recipe.yaml                                                      # for this machine's GPU
  treepo-trl plan --config recipe.yaml --max_completion_length 4096 --card_gib 24           # and what if
""",
    "sample": """\
examples:
  treepo-trl sample --model_name_or_path MODEL --dataset_name prompts.jsonl --output trees.jsonl
  treepo-trl sample --model_name_or_path MODEL --dataset_name prompts.jsonl --compare independent   # what trees save
  echo "What is 2 + 3?" | treepo-trl sample --model_name_or_path MODEL --num_generations 8
""",
    "eval": """\
examples:
  treepo-trl eval --model_name_or_path MODEL --adapters outputs/run --dataset_name gsm8k --max_prompts 200
  treepo-trl eval --model_name_or_path MODEL --dataset_name math500 --num_generations 1 --temperature 0   # greedy
  treepo-trl eval --model_name_or_path MODEL --dataset_name tasks.jsonl --reward_funcs my_package.rewards.mine
""",
    "doctor": """\
examples:
  treepo-trl doctor                          # whether training works on this machine
  treepo-trl doctor --config recipe.yaml     # what a recipe needs, and no more
  treepo-trl doctor --json > doctor.json     # to attach to an issue
""",
    "view": """\
examples:
  treepo-trl view outputs/quickstart --out trees.html              # one file, to open or to send
  treepo-trl view outputs/first outputs/second --out both.html     # two runs side by side
  treepo-trl view outputs/long-run --serve                         # a large log, from this machine to this machine
  treepo-trl view outputs/quickstart --health                      # what is wrong with the training, in words
""",
    "export": """\
examples:
  treepo-trl export outputs/quickstart --out quickstart-merged              # a run, as it ended
  treepo-trl export outputs/run/checkpoint-200 --out step-200               # a checkpoint
  treepo-trl export my-adapter --load_in_4bit true --out merged             # QLoRA of another trainer
""",
    "completion": """\
examples:
  treepo-trl completion bash > ~/.local/share/bash-completion/completions/treepo-trl   # for new shells
  source <(treepo-trl completion bash)                                                 # for this one
  treepo-trl completion zsh > ~/.zfunc/_treepo-trl                                     # a folder of $fpath
""",
}
