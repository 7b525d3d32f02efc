"""
The commands of `treepo-trl`, a file each, and what they share: arguments, prompts, engines, errors.
"""

COMMANDS = {
    "quickstart": ("a small model learns to add, without a hub", "treepo_trl.commands.quickstart"),
    "train": ("fine-tune a model with TreePOTrainer", "treepo_trl.commands.train"),
    "plan": ("what a training would take of a GPU's memory", "treepo_trl.commands.plan"),
    "sample": ("sample trees of completions without training", "treepo_trl.commands.sample"),
    "eval": ("how good a model and its adapters are", "treepo_trl.commands.eval"),
    "doctor": ("whether training works on this machine", "treepo_trl.apps.doctor.command"),
    "view": ("the trees of a run in a browser", "treepo_trl.commands.view"),
    "export": ("merge an adapter into its base, checked", "treepo_trl.commands.export"),
    "completion": ("a script that completes options in bash or zsh", "treepo_trl.commands.completion"),
}
"""A command's line of help, and its module: `main` gets the arguments after its name, `command_parser` has options."""
