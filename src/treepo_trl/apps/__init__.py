"""
The programs of `treepo-trl`: an app is one folder, and its command is `command.py` there.
"""

COMMANDS = {
    "quickstart": ("a small model learns to add, without a hub", "treepo_trl.quickstart.command"),
    "train": ("fine-tune a model with TreePOTrainer", "treepo_trl.apps.train.command"),
    "plan": ("what a training would take of a GPU's memory", "treepo_trl.apps.plan.command"),
    "sample": ("sample trees of completions without training", "treepo_trl.apps.sample.command"),
    "eval": ("how good a model and its adapters are", "treepo_trl.apps.eval.command"),
    "doctor": ("whether training works on this machine", "treepo_trl.apps.doctor.command"),
    "view": ("the trees of a run in a browser", "treepo_trl.apps.view.command"),
    "export": ("merge an adapter into its base, checked", "treepo_trl.apps.export.command"),
    "completion": ("a script that completes options in bash or zsh", "treepo_trl.apps.completion.command"),
}
"""A command's line of help, and its module: `main` gets the arguments after its name, `command_parser` has options."""
