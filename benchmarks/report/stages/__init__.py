"""The stages of the GPU report. A stage calls another benchmark's functions, with sizes for a card or toy sizes."""

from benchmarks.report.cases import Stage

from . import checkup, engines, kernels, learning, qlora, rollouts, servers, sharded, speculation, trainings


STAGES: list[Stage] = [
    checkup.DOCTOR,
    kernels.KERNELS,
    rollouts.ROLLOUT,
    servers.SERVERS,
    engines.SYNC,
    engines.SLEEP,
    trainings.SHARED_BASE,
    qlora.QLORA,
    trainings.RECIPES,
    trainings.STEP,
    sharded.SHARDED,
    speculation.SPECULATION,
    learning.LEARNING,
]
"""In the order of the page, the quick ones first."""
