"""
The commands of `treepo-trl`, a file each, and what they share: arguments, prompts, engines, errors.
"""

COMMANDS = {
    "quickstart": ("a small model learns to add, without a hub", "quickstart"),
    "train": ("fine-tune a model with TreePOTrainer", "train"),
    "plan": ("what a training would take of a GPU's memory", "plan"),
    "sample": ("sample trees of completions without training", "sample"),
    "eval": ("how good a model and its adapters are", "eval"),
    "doctor": ("whether training works on this machine", "doctor"),
    "view": ("the trees of a run in a browser", "view"),
    "export": ("merge an adapter into its base, checked", "export"),
    "completion": ("a script that completes options in bash or zsh", "completion"),
}
"""A command's line of help, and its module: `main` gets the arguments after its name, `command_parser` has options."""
