"""Lines of other packages that a user can do nothing about, kept from the terminal of a command."""

import logging
import warnings


_NOISE = {
    # bitsandbytes asks for a kernel of the hub that only serves 4 bits on a processor, and goes on without it.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # vLLM for processors finds the triton that torch brings, and needs none.
    "vllm.triton_utils.importing": "Disabling Triton",
    # transformers says for each layer class that hub kernels are off, as this package has them.
    "transformers.integrations.hub_kernels": "kernels hub usage is disabled",
}
"""What such a line holds, by the logger that writes it."""


def quiet_terminal() -> None:
    """Leave out these lines, and no others of the same packages."""
    # TRL's default sets it by its older name.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    for name, text in _NOISE.items():
        logging.getLogger(name).addFilter(_Without(text))


class _Without(logging.Filter):
    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is kept."""
        return self._text not in record.getMessage()
