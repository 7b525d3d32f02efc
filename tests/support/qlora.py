"""Tiny 4-bit policies with adapters."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def qlora(folder: str, dtype: str = "float32", **changes: Any) -> Any:
    """The model of a folder in 4 bits with a random adapter; `changes` are settings of `BitsAndBytesConfig`."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **changes}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, dtype), **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    # In training mode: in evaluation bitsandbytes computes in bfloat16 on some CPUs.
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
