"""What float16 training needs of a policy: weights that are trained in float32, whose gradients can be unscaled."""

from typing import TYPE_CHECKING

import torch
from accelerate.utils import is_peft_model


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def keep_master_weights(model: "PreTrainedModel | PeftModel") -> None:
    """
    Put an adapter's weights into float32, in place.

    TRL puts those of a 4-bit model into bfloat16, which old cards do not have. The gradient scaler takes no gradients
    in 16 bits: small steps would be lost in such weights, and the scaled gradients are out of their range.

    Raises:
        ValueError: if the model itself is trained in 16 bits.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    halves = [parameter for parameter in trained if parameter.dtype in (torch.float16, torch.bfloat16)]
    if halves and not is_peft_model(model):
        raise ValueError(
            f"`fp16=True` trains weights of a model in {halves[0].dtype}, whose gradients the scaler does not take. "
            "Load it in float32 (`--dtype float32`), or train an adapter (`--use_peft`)."
        )
    for parameter in halves:
        parameter.data = parameter.data.float()
