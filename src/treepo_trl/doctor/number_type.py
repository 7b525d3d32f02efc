"""Does this device compute and train in the number type that is asked for?"""

import torch

from treepo_trl.settings.arguments import check_arguments
from treepo_trl.treepo_config import TreePOConfig

from .findings import BrokenError, last_line, line_of
from .needs import Needs, NumberType


_SETTING = {"bfloat16": "bf16: true", "float16": "fp16: true, bf16: false", "float32": "bf16: false"}
_LARGEST_ERROR = 0.05  # of the loss's scale; a bfloat16 has 8 bits


def check_number_type(needs: Needs) -> str:
    """
    Train a linear layer for one step in the recipe's type, as the trainer does; without a recipe in both half types.
    """
    device = training_device(needs)
    if needs.number_type is not None:
        _check_accepted(needs.number_type, needs.use_cpu)
        reason = why_not(needs.number_type, device)
        if reason is not None:
            raise BrokenError(
                f"{needs.number_type} does not work here: {reason}.", _instead_of(needs.number_type, device)
            )
        return f"{needs.number_type} multiplies and trains on {device.type}"
    reasons = {number_type: why_not(number_type, device) for number_type in ("bfloat16", "float16")}
    working = [number_type for number_type, reason in reasons.items() if reason is None]
    if not working:
        causes = "; ".join(f"{number_type}: {reason}" for number_type, reason in reasons.items())
        raise BrokenError(f"No half precision works here: {causes}.", f"Set `{_SETTING['float32']}`.")
    on_cpu = ", with `use_cpu: true` on a processor" if device.type == "cpu" else ""
    return f"{' and '.join(working)} work on {device.type}: set `{_SETTING[working[0]]}`{on_cpu}"


def training_device(needs: Needs) -> torch.device:
    """Where the training would compute."""
    return torch.device("cuda" if torch.cuda.is_available() and not needs.use_cpu else "cpu")


def _check_accepted(number_type: NumberType, use_cpu: bool) -> None:
    """Ask transformers and the trainer, which refuse some types by what they know of the machine."""
    try:
        args = TreePOConfig(
            "unused", bf16=number_type == "bfloat16", fp16=number_type == "float16", use_cpu=use_cpu, report_to=[]
        )
        check_arguments(args, None, None, None)
    except ValueError as error:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        raise BrokenError(
            f"{number_type} is refused here: {last_line(str(error))}", _instead_of(number_type, device)
        ) from error


def _instead_of(number_type: NumberType, device: torch.device) -> str:
    if device.type == "cpu":
        settings = "`use_cpu: true`, `fp16: false`" if number_type == "float16" else "`use_cpu: true`"
        return f"This recipe is for a GPU. To train on a processor set {settings} and `bf16: false`."
    other = "float16" if number_type == "bfloat16" else "bfloat16"
    choice = other if why_not(other, device) is None else "float32"
    return f"Set `{_SETTING[choice]}`."


def why_not(number_type: NumberType, device: torch.device) -> str | None:
    """Why a layer does not train in this type on this device; `None` if it does."""
    dtype: torch.dtype = getattr(torch, number_type)
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        return "the card has no bfloat16 (compute capability below 8.0), torch only imitates it"
    try:
        error = _error_of_a_step(dtype, device)
    except (RuntimeError, NotImplementedError) as caught:  # no kernel, or not in this build
        return line_of(caught)
    return None if error <= _LARGEST_ERROR else f"a step differs from float32 by {error:.2g}"


def _error_of_a_step(dtype: torch.dtype, device: torch.device) -> float:
    """Relative difference between a weight after a step in this type, with a scaler for float16, and in float32."""
    changes = []
    for type_of_step in (torch.float32, dtype):
        generator = torch.Generator().manual_seed(0)
        weight, rows = (torch.randn(64, 64, generator=generator).to(device) for _ in range(2))
        parameter = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scaler = torch.amp.GradScaler(device.type, enabled=type_of_step == torch.float16)  # type: ignore[attr-defined]
        with torch.autocast(device.type, dtype=type_of_step, enabled=type_of_step != torch.float32):
            loss = (rows @ parameter).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        changes.append(parameter.detach() - weight)
    return ((changes[1] - changes[0]).norm() / changes[0].norm()).item()
