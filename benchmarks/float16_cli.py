"""
`treepo-trl` where `fp16=True` works on a processor too, as on a card: autocast and the gradient scaler.

    python -m benchmarks.float16_cli quickstart --dtype float16 --bf16 false --fp16 true

A training refuses that, since a processor has no float16 arithmetic worth waiting for. This is for comparing numbers.
The scaler starts at 1024 in place of 65536, which short trainings lose steps to.
"""

import pytest

from tests.support.half_precision import float16_on_cpu
from treepo_trl.cli import main


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patched:
        float16_on_cpu(patched)
        main()
