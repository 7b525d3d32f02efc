"""The vLLM servers of a training: checked before they sample, each with the current version of the policy."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from treepo_trl.servers.connection import ServerConnection, ServerLostError, ServerRefusedError
from treepo_trl.servers.facts import ServerFacts

from .checks import ServerNeeds, check_server
from .versions import PolicyVersions


logger = logging.getLogger(__name__)  # also where nothing is accelerated
Result = TypeVar("Result")

PROBE_TOKENS = 64
# Nats per token between two models. In float32 another adapter of a tiny model is at 0.15, and rounding far below. The
# 14 nats of a random token are rounded by 0.06 to 0.09 in bfloat16 (SmolLM2-135M, vLLM against transformers).
_OTHER_MODEL, _OTHER_MODEL_IN_16_BITS = 0.1, 0.4
_AGAIN = 1.0  # seconds between two questions whether a server is up
_HEALTH_SECONDS = 30.0
_NO_VLLM = (401, 403, 407)  # a gateway whose password is not given; other answers may be those of one that starts


class PolicyServers:
    """
    The servers, and what they have of the policy. Lives in the main process.

    Args:
        urls (`list[str]`):
            Their addresses.
        needs ([`ServerNeeds`]):
            What each of them must be.
        versions ([`PolicyVersions`]):
            Of the policy.
        timeout (`float`):
            Seconds that a start waits for them, and after which a request counts as lost.
        is_probed (`bool`):
            Whether servers are compared with each other whenever they get a version, and one that comes back with
            what they computed then.

    Attributes:
        reference (`torch.Tensor`, *optional*):
            What the servers, or else the policy, compute for the tokens of `probe_ids` with the current version, in
            nats; `None` if nobody has asked.
        on_lost (`Callable`):
            Told of a server that is found lost, or wrong.
        bound (`float`):
            Mean difference in nats per token from which on a probe has found another model; see `bound_of_probe`.
    """

    def __init__(
        self, urls: list[str], needs: ServerNeeds, versions: PolicyVersions, timeout: float, is_probed: bool
    ) -> None:
        self.servers = [ServerConnection(url, timeout) for url in urls]
        self.versions = versions
        self._needs, self._timeout, self._is_probed = needs, timeout, is_probed
        self.on_lost: Callable[[ServerConnection, Exception], None] = _warn
        self.bound = _OTHER_MODEL
        self._lock = threading.Lock()  # held by whoever gives all of them a version, or admits one
        self._admissions = {server: threading.Lock() for server in self.servers}  # two engines may have lost one
        self._out: set[ServerConnection] = set()  # lost, or wrong, until they are admitted
        self._number_type: str | None = None
        self._is_quantized = False
        self.reference: torch.Tensor | None = None
        self._reference_of: str | None = None  # version

    def open(self) -> ServerFacts:
        """
        Wait until all servers are up, and check each; the facts of the first.

        Raises:
            ValueError: for a server that is not up in time, or not what the policy needs.
        """
        deadline = time.monotonic() + self._timeout  # of all together
        for server in self.servers:
            wait_for_server(server, deadline - time.monotonic())
        found = self._of_each(lambda server: check_server(server, self._needs), self.servers)
        facts = next(iter(found.values()), None)
        if facts is None or len(found) < len(self.servers):
            lost = next(server for server in self.servers if server not in found)
            raise ValueError(f"The vLLM server at {lost.url} went away while it was checked. Look at its log.")
        check_number_types({server.url: each for server, each in found.items()})
        self._number_type, self._is_quantized = number_type(facts), facts.quantization is not None
        self.bound = bound_of_probe(getattr(torch, facts.dtype))  # whoever knows the policy's type sets it again
        return facts

    def distribute(self) -> None:
        """
        Give the version that was just written to all servers that have the one before.

        The others were lost or started anew. They get it once they have passed all checks (`admit`).

        Raises:
            ValueError: if a server cannot load the first version, or none of those that have the one before a later
                one; or if a server computes something else with it than the first.
        """
        with self._lock:
            asked = [server for server in self.servers if server not in self._out]
            found = self._of_each(self._give, asked)
            refused = {server: error for server, error in found.items() if error is not None}
            if refused and len(refused) == len(found):  # the others are lost
                raise next(iter(refused.values()))
            for server, error in refused.items():
                self._lose(server, error)
            loaded = [server for server, error in found.items() if error is None]
            self.versions.remove_old(loaded)
            if self._is_probed:
                computed = self._of_each(self._probe_loaded, loaded)
                self.reference, self._reference_of = next(iter(computed.values()), None), self.versions.name
                for server, logprobs in computed.items():
                    self._compare(server, logprobs)

    @property
    def needs_reference(self) -> bool:
        """
        Whether no server has the current version, and so the policy must say what one that comes back is to compute.

        A quantized one computes something else by design: the first is compared with nothing, and the next with it.
        """
        return self._is_probed and not self._is_quantized and self.reference is None

    def take_reference(self, logprobs: torch.Tensor) -> None:
        """Compare the servers that come back with the policy; no server is admitted before."""
        with self._lock:
            self.reference, self._reference_of = logprobs, self.versions.name

    def _give(self, server: ServerConnection) -> Exception | None:
        """Load the current version; what a server has against one that is not the first."""
        versions = self.versions
        if len(versions.names) == 1:
            check_server(server, self._needs)
            versions.load(server)
            return None
        versions.check_has(server, versions.names[-2:])  # both are right: it may have been admitted just now
        try:
            versions.load(server)
        except (ValueError, ServerRefusedError) as error:
            return error
        return None

    def check_idle(self, server: ServerConnection) -> None:
        """
        Raise if a server was started anew since it was given the current version, or is still to be admitted.

        Raises:
            ServerLostError: if so, or if it cannot be reached.
        """
        if server in self._out:  # of another engine; it may have the version, and compute something else
            raise ServerLostError(f"{server.url} was lost, and was not checked since.")
        name = self.versions.name
        if name is not None:
            self.versions.check_has(server, [name])

    def admit(self, server: ServerConnection) -> None:
        """
        Check a server that was lost and answers again, give it the current version, and let it generate a token.

        Raises:
            ValueError: if it is not what it was.
            ServerLostError: if it is lost again, or if nobody has computed anything with the current version yet.
        """
        self._out.add(server)
        self._check_again(server)
        with self._admissions[server]:
            while not self._is_admitted(server):
                pass

    def _check_again(self, server: ServerConnection) -> None:
        """
        Raise unless a server that was started anew is what it was.

        Raises:
            ValueError: saying what is another.
        """
        facts = check_server(server, self._needs)
        if self._number_type not in (None, number_type(facts)):
            raise ValueError(
                f"The vLLM server at {server.url} computes in {number_type(facts)}, and in {self._number_type} before "
                "it was started anew. Start it with the same `--dtype` and `--quantization`."
            )

    def _is_admitted(self, server: ServerConnection) -> bool:
        """
        Give a server the current version; what is running on others goes on, and they may get a new one meanwhile.

        Returns:
            `bool`: whether it still is the current one. Else it is to be given again.
        """
        name = self.versions.name
        try:
            if name is not None:
                self.versions.load(server)
            logprobs = self._probe(server)  # in any case: an engine that hangs is not there
        except (ValueError, ServerRefusedError):
            if name == self.versions.name:
                raise
            return False  # its folder is gone
        with self._lock:  # not before: a server that hangs would keep the others from a new version
            if name != self.versions.name:
                return False
            if name is not None and self._is_probed:
                self._compare(server, logprobs)
            self._out.discard(server)
            return True

    def _probe(self, server: ServerConnection) -> torch.Tensor:
        model = self.versions.model or server.facts().model_name
        return probe_logprobs(server, model, self.probe_ids())

    def _probe_loaded(self, server: ServerConnection) -> torch.Tensor:
        try:
            return self._probe(server)
        except ServerRefusedError as error:
            if error.status != 404:
                raise
            raise ServerLostError(str(error), 404) from error  # it was started anew since it has loaded the version

    def probe_ids(self) -> list[int]:
        """The tokens of a probe, the same at all times."""
        count = min(PROBE_TOKENS, self._needs.context_length - 1)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(len(self._needs.tokenizer), (max(count, 2),), generator=generator).tolist()

    def _compare(self, server: ServerConnection, logprobs: torch.Tensor) -> None:
        if self._reference_of != self.versions.name or self.needs_reference:
            raise ServerLostError(f"{server.url} is admitted later: there is nothing to compare it with yet.")
        if self.reference is None:
            self.reference = logprobs
        difference = float((logprobs - self.reference).abs().mean())
        if not difference <= self.bound:
            raise ValueError(
                f"The vLLM server at {server.url} computes another model than the others or the policy, or than "
                f"before it was started anew: {difference:.3f} nats per token apart. Compare model, revision "
                "and number type of the servers."
            )

    def _of_each(
        self, function: Callable[[ServerConnection], Result], servers: list[ServerConnection]
    ) -> dict[ServerConnection, Result]:
        """Results of a function for several servers at once, without those that are lost meanwhile."""
        if not servers:
            return {}
        with ThreadPoolExecutor(len(servers)) as threads:
            futures = {server: threads.submit(function, server) for server in servers}
        found = {}
        for server, future in futures.items():
            try:
                found[server] = future.result()
            except ServerLostError as error:
                self._lose(server, error)
        return found

    def _lose(self, server: ServerConnection, error: Exception) -> None:
        self._out.add(server)
        self.on_lost(server, error)


def number_type(facts: ServerFacts) -> str:
    """What a server computes in, in words."""
    return " with ".join(filter(None, (facts.dtype, facts.quantization)))


def check_number_types(found: Mapping[str, ServerFacts]) -> None:
    """
    Raise unless servers compute in the same number type.

    Args:
        found (`Mapping[str, ServerFacts]`):
            What each says about itself, by its address.
    """
    types = {url: number_type(facts) for url, facts in found.items()}
    if len(set(types.values())) > 1:
        raise ValueError(
            "The vLLM servers compute in different number types: "
            f"{', '.join(f'{url} in {each}' for url, each in types.items())}. Start them all with the same `--dtype` "
            "and `--quantization`."
        )


def wait_for_server(server: ServerConnection, seconds: float) -> None:
    """
    Wait until a server is up.

    Raises:
        ValueError: if it is not in time, or something else answers in its place.
    """
    deadline, is_told = time.monotonic() + seconds, False
    while True:
        left = deadline - time.monotonic()
        try:
            server.get("/health", min(_HEALTH_SECONDS, max(left, _AGAIN)))
            return
        except ServerRefusedError as error:
            if error.status in _NO_VLLM:
                raise ValueError(
                    f"{error} That is no vLLM server: correct `vllm_server_base_url`, or write user and password of "
                    "your gateway into it (`https://user:password@host`)."
                ) from error
            reason: Exception = error
        except ServerLostError as error:
            reason = error
        if left <= 0:
            raise ValueError(
                f"No vLLM server answers at {server.url}. Start it with `vllm serve`, or correct "
                "`vllm_server_base_url`. `vllm_server_timeout` says for how many seconds a start waits. The last try: "
                f"{reason}"
            ) from reason
        if not is_told:
            logger.warning(f"Waiting for the vLLM server at {server.url}.")
            is_told = True
        time.sleep(_AGAIN)


def _warn(server: ServerConnection, error: Exception) -> None:
    logger.warning(f"The vLLM server at {server.url} is lost: {error}")


def probe_logprobs(server: ServerConnection, model: str, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, as a server computes them at temperature 1."""
    options = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
    body = {"model": model, "token_ids": token_ids, "sampling_params": options}
    found = server.post("/inference/v1/generate", body)["prompt_logprobs"]
    scored = zip(found[1:], token_ids[1:], strict=True)
    return torch.tensor([position[str(token)]["logprob"] for position, token in scored], dtype=torch.float64)


def bound_of_probe(*dtypes: torch.dtype) -> float:
    """Mean difference in nats per random token that no rounding makes, between models of these number types."""
    return _OTHER_MODEL if set(dtypes) <= {torch.float32, torch.float64} else _OTHER_MODEL_IN_16_BITS


def check_policy(difference: float, bound: float, is_quantized: bool) -> None:
    """
    Raise if servers compute another model than the policy.

    Raises:
        ValueError: for a mean difference in nats per token that no rounding makes.
    """
    if not is_quantized and not difference <= bound:
        raise ValueError(
            f"The vLLM servers compute another model than the policy: {difference:.3f} nats per token apart with the "
            "same adapter or weights. Compare model, revision and number type; restart a server that another "
            "training has given its weights. `engine_check='off'` does not look."
        )
