"""The vLLM servers that a recipe names: whether they answer, and are what its policy needs."""

from typing import TYPE_CHECKING, cast

from transformers import AutoTokenizer

from treepo_trl.policy.starting_adapter import new_adapter_config
from treepo_trl.servers.checks import ServerNeeds, check_number_types, check_server
from treepo_trl.servers.connection import ServerConnection, ServerLostError
from treepo_trl.servers.versions import AdapterVersions
from treepo_trl.settings import server_urls

from .findings import BrokenError
from .recipe import Recipe


if TYPE_CHECKING:
    from treepo_trl.servers.facts import ServerFacts


_SECONDS = 10.0
_START = "Start it as docs/servers.md says."


def check_servers(recipe: Recipe) -> str:
    """Check the servers of a recipe against the policy that it would train."""
    args, model = recipe.training, recipe.model
    adapter = recipe.adapter or new_adapter_config(model)
    has_adapter = adapter is not None and args.vllm_lora_sync == "adapter"
    needs = ServerNeeds(
        cast(str, model.model_name_or_path),
        AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision),
        args.vllm_max_model_length or args.max_completion_length + 1,
        args.branching_policy == "entropy",
        AdapterVersions.kept if has_adapter else 0,
        getattr(adapter, "r", 0) if has_adapter else 0,
        all_weights=not has_adapter,
    )
    urls = server_urls(args.vllm_server_base_url, args.vllm_server_host, args.vllm_server_port)
    return check_each(urls, needs)


def check_each(urls: list[str], needs: ServerNeeds) -> str:
    """Check each of the servers at these addresses, as a training does at its start."""
    found: dict[str, ServerFacts] = {}
    for url in urls:
        server = ServerConnection(url, _SECONDS)
        try:
            found[server.url] = check_server(server, needs)
            check_number_types(found)
        except ServerLostError as error:
            raise BrokenError(
                f"No vLLM server answers at {server.url}: {error}",
                "Start it with `vllm serve`, or correct `vllm_server_base_url`.",
            ) from error
        except ValueError as error:
            cause, _, remedy = str(error).rpartition(". Start ")
            raise BrokenError(*((f"{cause}.", f"Start {remedy}") if cause else (str(error), _START))) from error
    count = f"{len(found)} server{'s' * (len(found) > 1)}"
    slots = sum(facts.num_slots for facts in found.values())
    first = next(iter(found.values()))
    return f"{count} of vLLM {first.version} in {first.dtype}: {slots} requests at once; no folder was loaded"
