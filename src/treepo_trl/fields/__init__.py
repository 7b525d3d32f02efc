"""
What a field of settings may hold: types, choices, ranges, values of GRPOConfig, and what excludes each other in vLLM.

Every room may import it, so it loads the standard library alone; `grpo` needs TRL, and is imported by its name.
"""

from .addresses import keep_credentials, place_and_headers, server_urls
from .values import Ranges, check_fields, check_int, check_text
from .vllm import check_vllm_fields


__all__ = [
    "Ranges",
    "check_fields",
    "check_int",
    "check_text",
    "check_vllm_fields",
    "keep_credentials",
    "place_and_headers",
    "server_urls",
]
