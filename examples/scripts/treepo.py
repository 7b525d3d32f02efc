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

from trl import DatasetMixtureConfig, ModelConfig, TrlParser

from treepo_trl import TreePOConfig
from treepo_trl.cli import TreePOScriptArguments, train


if __name__ == "__main__":
    parser = TrlParser((TreePOScriptArguments, TreePOConfig, ModelConfig, DatasetMixtureConfig))
    script_args, training_args, model_args, dataset_args = parser.parse_args_and_config()
    train(script_args, training_args, model_args, dataset_args)
