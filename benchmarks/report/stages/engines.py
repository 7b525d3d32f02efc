"""vLLM beside the policy: how its weights follow, and what it gives back while it sleeps."""

from typing import Any

from benchmarks.report.cases import Case, Record, Stage, require_card
from treepo_trl.apps.doctor.findings import CannotRunError


LORA = "qwen2.5-1.5b"
SLEEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL's engine": ("merge", {}),
    "engine with adapter": ("adapter", {}),
    "engine with adapter, weights stay": ("adapter", {"vllm_sleep_keeps_weights": True}),
}
"""How the engine gets the policy, and its settings."""


def synchronize(record: Record, model: str, way: str, label: str, options: list[str]) -> None:
    """Time from an optimizer step to an engine that answers with the new policy, and the engine's speed."""
    import torch

    from benchmarks import weight_sync

    if way == "merge" and not torch.cuda.is_available():
        raise CannotRunError("vLLM for CPUs packs its weights and takes none after that")
    args = weight_sync.parse_options(options)
    trainer = weight_sync.build(model, way, args)
    for value in weight_sync.measure_syncs(trainer, args):
        record(f"{label}, {way}: ms per synchronization", 1000 * value)
    record(f"{label}, {way}: tokens/s of the engine", weight_sync.measure_speed(trainer, args))


def sync_cases(smoke: bool) -> list[Case]:
    """Each way, in a process of its own."""
    if smoke:
        toy = ["--repeats", "1", "--prompts", "2", "--tokens", "4", "--generations", "1", "--rank", "4"]
        given = {"label": "tiny", "options": toy}
        return [Case(way, synchronize, {"way": way, **given}, "tiny") for way in ("adapter", "merge")]
    return [Case(way, synchronize, {"way": way, "label": "1.5B", "options": []}, LORA) for way in ("adapter", "merge")]


def sleep(record: Record, model: str, name: str) -> None:
    """Seconds and memory of an engine that sleeps and wakes with the current policy."""
    require_card("vLLM's sleep mode")
    from benchmarks import weight_sync
    from benchmarks.common import seconds
    from benchmarks.memory import GIB, used_bytes

    way, settings = SLEEPS[name]
    args = weight_sync.parse_options([])
    trainer = weight_sync.build(model, way, args, vllm_enable_sleep_mode=True, **settings)
    generation = trainer.vllm_generation

    def wake() -> None:
        generation.sync_weights()
        generation.llm.wake_up(tags=["kv_cache"])

    def fall_asleep() -> None:  # as TRL's `generate` does in the end
        generation.llm.sleep(level=2)
        generation._llm_weights_sleeping = True

    for _ in range(6):
        woken = seconds(wake)
        record(f"{name}: GiB awake", used_bytes() / GIB)
        slept = seconds(fall_asleep)
        record(f"{name}: GiB asleep", used_bytes() / GIB)
        record(f"{name}: s to wake with the current policy", woken)
        record(f"{name}: s to fall asleep", slept)


def sleep_cases(smoke: bool) -> list[Case]:
    """Each mode, in a process of its own."""
    return [Case(name, sleep, {"name": name}, "tiny" if smoke else LORA) for name in SLEEPS]


SYNC = Stage(
    name="sync",
    title="Synchronization of the engine",
    about="""\
LoRA of rank 16 on all linear layers (`benchmarks.weight_sync`). *Adapter* loads the adapter into vLLM, *merge* is
TRL's way, which pushes every merged weight. The engine's speed is that of 64 prompts at a time.""",
    cases=sync_cases,
)
SLEEP = Stage(
    name="sleep",
    title="Sleep and wake",
    about="""\
What vLLM gives back during the update. GiB are all that is in use on the card, policy included. Waking includes the
synchronization.""",
    cases=sleep_cases,
)
