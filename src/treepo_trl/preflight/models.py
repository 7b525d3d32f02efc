"""Names of models, adapters and data: folders that are not there, and a hub that cannot be reached."""

import os
import sys
from pathlib import Path


_TIMEOUT = 5  # seconds for the hub's first answer


def require_model(name: str | None) -> str:
    """
    The name or folder of the model.

    Raises:
        ValueError: if none is given, or an adapter instead of one.
    """
    if not name:
        raise ValueError("No model: give `--model_name_or_path` (hub id or folder).")
    folder = Path(name)
    if name.startswith(("/", ".", "~")) and not folder.is_dir():
        raise ValueError(f"`--model_name_or_path {name}` looks like a folder, but there is none.")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"`--model_name_or_path {name}` is an adapter. Name the model that it belongs to, and the adapter as "
            "`--adapter_name_or_path`, for `eval` as `--adapters`. `train` resumes a checkpoint of its own with "
            "`--resume_from_checkpoint`."
        )
    return name


def check_hub(names: dict[str, str], revision: str | None = None, is_refused: bool = True) -> None:
    """
    Ask once whether the hub answers, where a name is one of the hub: transformers asks six times, for 25 seconds.

    Where it does not answer, models come from the hub's cache, and nothing is asked of it any more.

    Args:
        names (`dict[str, str]`):
            Of models, adapters and data sets, by the option that gave each.
        revision (`str`, *optional*):
            Of the model.
        is_refused (`bool`, *optional*, defaults to `True`):
            Whether to raise for a model that is not here.

    Raises:
        ValueError: if the hub does not answer and a model is not in the cache.
    """
    remote = {option: name for option, name in names.items() if not os.path.exists(name)}
    if not remote:
        return
    from huggingface_hub import constants

    reason = "`HF_HUB_OFFLINE` is set" if constants.HF_HUB_OFFLINE else _why_unreachable()
    if reason is None:
        return
    for option, name in remote.items():
        if is_refused and option == "model_name_or_path" and not _is_cached(name, revision):
            raise ValueError(
                f"`--{option} {name}` is no folder here and not in the hub's cache, and the hub cannot be asked: "
                f"{reason}. Give a folder, or try again with a connection."
            )
    if not constants.HF_HUB_OFFLINE:
        os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "1", True
        print(f"The hub cannot be asked ({reason}): models and data come from its cache.", file=sys.stderr)


def _why_unreachable() -> str | None:
    """Why the hub gives no answer at all, in two tries; `None` if it gives any, be it a refusal."""
    import httpx
    from huggingface_hub import constants, get_session

    reason = None
    for _ in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
            return None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, ValueError) as error:  # of an address, or of a proxy's
            return f"{constants.ENDPOINT}: {str(error).rstrip('.')} (look at `HF_ENDPOINT` and the proxies)"
        except httpx.TransportError as error:
            reason = f"{constants.ENDPOINT}: {str(error) or type(error).__name__}"
    return reason


def _is_cached(model: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)
    except (ValueError, OSError):  # no name that the hub could have; what loads it says so
        return True
