"""The vLLM servers that a recipe names: whether they answer, and are what its policy needs."""

from typing import TYPE_CHECKING

from treepo_trl.engines.server_connection import ServerConnection, ServerLostError
from treepo_trl.policy.servers.checks import ServerNeeds, check_server
from treepo_trl.policy.servers.policy_servers import check_number_types

from .findings import BrokenError


if TYPE_CHECKING:
    from treepo_trl.engines.server_facts import ServerFacts


_SECONDS = 10.0


def check_servers(urls: list[str], needs: ServerNeeds) -> str:
    """
    Check each server, as a training does at its start.

    Args:
        urls (`list[str]`):
            Their addresses.
        needs ([`ServerNeeds`]):
            What each must be.
    """
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
            if not cause:
                raise BrokenError(str(error), "Start it as docs/servers.md says.") from error
            raise BrokenError(f"{cause}.", f"Start {remedy}") from error
    count = f"{len(found)} server{'s' * (len(found) > 1)}"
    slots = sum(facts.num_slots for facts in found.values())
    first = next(iter(found.values()))
    return f"{count} of vLLM {first.version} in {first.dtype}: {slots} requests at once; no folder was loaded"
