"""Versions that do not go together, by what the packages themselves require of each other."""

from collections.abc import Iterator, Sequence
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.version import Version

from .environment import PACKAGES, installed_as, installed_builds
from .findings import BrokenError


_PLUGIN = "vllm-bnb-plugin"
_VLLM_WITHOUT_BITSANDBYTES = Version("0.28")
"""From here on vLLM has its 4-bit layers in a package of its own. Beside it vLLM 0.22.0 was seen not to start."""


TRIED = {("5.16", "0.31"), ("5.17", "0.31"), ("5.24", None)}
"""Releases of transformers and vLLM that the tests ran with together; `None` is no vLLM."""


def vllm_window() -> str:
    """The versions of vLLM that the installed TRL supports, as pip writes them."""
    return next(f"vllm{r.specifier}" for r in _requirements("trl", {"vllm"}) if r.name == "vllm")


def check_versions(needed: Sequence[str]) -> str:
    """
    Check that each of the needed packages is there, in a version that the others take.

    Args:
        needed (`Sequence[str]`):
            Names out of `PACKAGES`. Others are left out, also where their versions exclude each other.
    """
    missing = [package for package in needed if package != _PLUGIN and installed_as(package) is None]
    if missing:
        raise BrokenError(f"{', '.join(missing)}: not installed.", " ".join(how_to_install(name) for name in missing))
    problems = list(excluded_pairs(needed))
    if problems:
        causes, remedies = zip(*problems, strict=True)
        raise BrokenError(" ".join(causes), " ".join(dict.fromkeys(remedies)))
    return f"{', '.join(needed)} go together by their own requirements{_never_tried(needed)}"


def _never_tried(needed: Sequence[str]) -> str:
    """A remark on transformers, or on a pair of it and vLLM, that no test ran with."""
    name = installed_as("vllm") if "vllm" in needed else None
    transformers, vllm = _release(version("transformers")), None if name is None else _release(version(name))
    tried = TRIED if vllm is not None else {(each, None) for each, _ in TRIED}
    if (transformers, vllm) in tried or "transformers" not in needed:
        return ""
    pair = f"transformers {transformers}" + ("" if vllm is None else f" with vLLM {vllm}")
    return f"; {pair} was never tried by the tests of this package"


def _release(text: str) -> str:
    return ".".join(Version(text).public.split(".")[:2])


def how_to_install(package: str) -> str:
    """The command that installs a package in a version that fits."""
    extra = {"vllm": "vllm", "peft": "peft", "bitsandbytes": "quantization"}
    if package not in extra:
        return f"Run `pip install --upgrade treepo-trl {package}`."
    instead = " Or leave `use_vllm` out to sample with transformers." if package == "vllm" else ""
    return f'Run `pip install "treepo-trl[{extra[package]}]"`.{instead}'


def excluded_pairs(needed: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What one package requires of another and does not get: the cause, and what to install."""
    for package in ("treepo-trl", *needed):
        name = installed_as(package)
        if name is None:
            continue
        for requirement in _requirements(name, set(needed)):
            other = installed_as(requirement.name)
            if other is None:
                continue
            found, wanted = Version(version(other)).public, _without_local(requirement)
            if not wanted.specifier.contains(found, prereleases=True):
                yield (
                    f"{package} {version(name)} wants {wanted.name}{wanted.specifier}, installed is {version(other)}.",
                    f'Run `pip install "{other}{wanted.specifier}"`.',
                )
    yield from _plugin_problem(needed)
    builds = installed_builds("vllm")
    if "vllm" in needed and len(builds) > 1:
        yield (
            f"{' and '.join(builds)} are both installed, and each has files of the other.",
            f"Run `pip uninstall {' '.join(builds)}` and install one of them anew: docs/install.md.",
        )


def _plugin_problem(needed: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What no package's requirements say: vLLM's 4-bit layers are in a plugin, from a version on."""
    name, plugin = installed_as("vllm"), installed_as(_PLUGIN)
    if name is None or "vllm" not in needed:
        return
    is_outside = Version(version(name)) >= _VLLM_WITHOUT_BITSANDBYTES
    if is_outside and plugin is None and _PLUGIN in needed:
        yield (
            f"vLLM {version(name)} has no 4-bit layers of its own.",
            f"Run `pip install {_PLUGIN}`, or set `vllm_base_weights: dequantized`.",
        )
    if not is_outside and plugin is not None:
        yield (
            f"vLLM {version(name)} has 4-bit layers of its own and does not start beside {_PLUGIN}.",
            f"Run `pip uninstall {_PLUGIN}`.",
        )


def _requirements(name: str, others: set[str]) -> Iterator[Requirement]:
    """What a distribution requires of these packages on this machine, with any of its extras that is for users."""
    for line in requires(name) or []:
        requirement = Requirement(line)
        extras = ("", "vllm", "peft", "quantization", "torch")
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        if requirement.name in PACKAGES and requirement.name in others and applies:
            yield requirement


def _without_local(requirement: Requirement) -> Requirement:
    """The same, where a build is named, of the version alone: a build for another device serves as well."""
    specifiers = [str(each).partition("+")[0] for each in requirement.specifier]
    return Requirement(f"{requirement.name}{','.join(sorted(specifiers))}")
