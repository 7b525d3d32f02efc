# /// script
# dependencies = ["treepo-trl[peft,math]"]
# ///

"""
Train with TreePO: full fine-tuning, LoRA or QLoRA by flags, like TRL's own scripts.

LoRA on one GPU with vLLM:

    python examples/scripts/treepo.py --config examples/cli_configs/qwen2.5-1.5b-lora-12gb.yaml

QLoRA on one GPU:

    python examples/scripts/treepo.py --config examples/cli_configs/qwen2.5-7b-qlora-24gb.yaml

Full fine-tuning on several GPUs:

    accelerate launch examples/scripts/treepo.py --config examples/cli_configs/paper-qwen2.5-7b.yaml
"""

from treepo_trl.apps.train.command import train
from treepo_trl.command_line.arguments import make_parser


if __name__ == "__main__":
    script_args, training_args, model_args, dataset_args = make_parser().parse_args_and_config()
    train(script_args, training_args, model_args, dataset_args)
