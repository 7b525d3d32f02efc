"""
Write `docs/health.md`: the table of rules from the code, between the two halves of its text.

    python docs/make_health.py
"""

from pathlib import Path

from treepo_trl.health import RULES


PAGE = Path(__file__).with_name("health.md")

OPENING = """\
<!-- Made by `make docs` from the rules in the code. Change them there, and the text in docs/make_health.py. -->

# Health of a training

A training can go on for hours and learn nothing.
`TreePOTrainer` reads its own logs and says in one line what is no longer usual:

```
Health, step 5: most prompts teach nothing: in 100% of the prompts all completions had the same reward, over 5 logs,
at a mean reward of 0. Usual: below 90% of the prompts. Look at the mean reward. If it is low: the completions and ...
```

A line names what was seen, what is usual and where to look.
It is a warning of the first process, and the training goes on unchanged.
Each illness is told once.
A resumed training does not repeat what was told before its checkpoint.

To switch it off:

```python
from treepo_trl.health import HealthCallback

trainer.remove_callback(HealthCallback)
```

## Afterwards

```sh
treepo-trl view outputs/quickstart --health
```

prints the same lines for a run that is over, or still under way.
It reads `trainer_state.json`, which checkpoints and the end of `treepo-trl train` write.
For steps after it, it reads the tree log (`log_trees: true`), which knows rewards, lengths and ends of completions.
The last line says which rules had nothing to read.

## The rules

A rule reads [metrics](metrics.md); of two that mean the same, the first that is logged.
With `logging_steps` above 1, a log is the mean of so many steps.
"""

CLOSING = """\
## What they cannot tell

- The range of rewards is not known, so *equal-rewards* does not say whether prompts are too hard or too easy. Its mean
  reward does.
- With few prompts a batch, the share of prompts with equal rewards is known late: it is averaged over 40 prompts.
  A log without `tree/prompts` counts as one.
- Five logs are few. A rule says what to look at, not what is wrong.
- A rule is silent without its metrics: *engine* needs vLLM.
- Jumps of gradient and KL, entropy, and a held-out reward that falls are not examined: what to do about them is no
  setting. The trackers of [loggers](logging.md) plot them.

The rules are silent on the quickstart with its three seeds.
*engine* had nothing to read there: it has no vLLM.
The ranges come from these runs, from the meaning of the metrics, and from no other training.
"""


def health_page() -> str:
    """The text of `docs/health.md`."""
    head = "| rule | says | reads | when | usual | look at |\n|---|---|---|---|---|---|\n"
    rows = [
        f"| {rule.name} | {rule.illness} | {', '.join(f'`{name}`' for name in rule.metrics)} | {rule.fires} "
        f"| {rule.usual} | {rule.look_at} |\n"
        for rule in RULES
    ]
    return "\n".join([OPENING, head + "".join(rows), CLOSING])


if __name__ == "__main__":
    PAGE.write_text(health_page(), encoding="utf-8")
