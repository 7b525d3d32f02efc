"""Engines without a model, for the sampler's logic."""

import hashlib
import math
import random
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from treepo_trl.engines import SegmentEngine, SegmentRequest, SegmentResult


EOS = 0


class QueueEngine(SegmentEngine):
    """Answers everything that is pending in the next `collect`, in order of submission."""

    def __init__(self) -> None:
        self.num_submits, self.aborted = 0, 0
        self._pending: list[SegmentRequest] = []

    @abstractmethod
    def answer(self, request: SegmentRequest) -> SegmentResult: ...

    def submit(self, requests: list[SegmentRequest]) -> None:
        self.num_submits += 1
        self._pending.extend(requests)

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        assert self._pending, "collect() without a request in flight would block for ever"
        done, self._pending = self._pending, []
        return [self.answer(request) for request in done]

    def abort(self) -> None:
        self.aborted += 1
        self._pending = []


class FakeEngine(QueueEngine):
    """
    Samples tokens from `draw(path, rng)`; the result depends only on the seed, the request's tokens and how many
    requests with these tokens came before, so it is the same whatever the order of arrival.

    `arrival` is the source of the order and the number of results per `collect`; `None` returns all at once, in order.
    `slots` requests run at once. `limits` are attributes of `SegmentEngine`, such as `context_length`. Entropies are
    random numbers.
    """

    def __init__(
        self,
        draw: Callable[[list[int], random.Random], int],
        seed: int = 0,
        arrival: random.Random | None = None,
        slots: int | None = None,
        **limits: int | None,
    ) -> None:
        super().__init__()
        self.draw, self.seed, self.arrival, self.slots = draw, seed, arrival, slots
        self.requests: list[SegmentRequest] = []
        self.results: list[SegmentResult] = []
        self.ended: list[int] = []
        for name, value in limits.items():
            assert hasattr(SegmentEngine, name), name
            setattr(self, name, value)

    def num_slots(self, length: int) -> int | None:
        return self.slots

    def submit(self, requests: list[SegmentRequest]) -> None:
        super().submit(requests)
        self.requests.extend(requests)
        self.num_prompt_tokens += sum(len(request.token_ids) for request in requests)

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        later: list[SegmentRequest] = []
        if self.arrival is not None and self._pending:
            self.arrival.shuffle(self._pending)
            count = self.arrival.randint(1, len(self._pending))
            self._pending, later = self._pending[:count], self._pending[count:]
        results = super().collect(wake)
        self._pending = later
        self.results.extend(results)
        return results

    def end_tree(self, tree: int) -> None:
        assert tree not in [request.tree for request in self._pending]
        self.ended.append(tree)

    def answer(self, request: SegmentRequest) -> SegmentResult:
        key = tuple(request.token_ids)
        # The n-th request for a prefix, in order of submission: request ids grow.
        earlier = [r for r in self.requests if tuple(r.token_ids) == key and r.request_id < request.request_id]
        digest = hashlib.sha256(repr((self.seed, key, len(earlier))).encode()).digest()
        rng = random.Random(digest)
        tokens: list[int] = []
        while len(tokens) < request.max_tokens and (not tokens or tokens[-1] != EOS):
            tokens.append(self.draw(request.token_ids + tokens, rng))
        logprobs = [-rng.random() for _ in tokens]
        entropies = [3 * rng.random() for _ in tokens] if self.reports_entropies else None
        reason = "stop" if tokens[-1] == EOS else "length"
        return SegmentResult(request.request_id, tokens, logprobs, reason, entropies)


def memoryless(stop_probability: float, vocabulary: int = 50) -> Callable[[list[int], random.Random], int]:
    """EOS with a fixed probability, otherwise a uniform token."""
    return lambda path, rng: EOS if rng.random() < stop_probability else rng.randint(1, vocabulary)


def endless(path: list[int], rng: random.Random) -> int:
    """Never EOS."""
    return rng.randint(1, 50)


class RecordingEngine(FakeEngine):
    """
    A `FakeEngine` that keeps the order of what happened.

    Results of requests that `withhold` names come only when nothing else is pending, one per `collect`.
    """

    def __init__(
        self,
        draw: Callable[[list[int], random.Random], int],
        withhold: Callable[[SegmentRequest], bool] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(draw, **options)
        self.withhold = withhold
        self.events: list[tuple[str, list[SegmentRequest] | list[SegmentResult]]] = []

    @property
    def owners(self) -> dict[int, int]:
        """First prompt token of each request: it names the tree of `sampling.prompts_of`."""
        return {request.request_id: request.token_ids[0] for request in self.requests}

    @property
    def levels(self) -> list[int]:
        """Requests of each batch that was submitted."""
        return [len(items) for kind, items in self.events if kind == "submit"]

    def submit(self, requests: list[SegmentRequest]) -> None:
        self.events.append(("submit", list(requests)))
        super().submit(requests)

    def collect(self, wake: Callable[[], bool] | None = None) -> list[SegmentResult]:
        held: list[SegmentRequest] = []
        if self.withhold is not None:
            held = [request for request in self._pending if self.withhold(request)]
            free = [request for request in self._pending if not self.withhold(request)]
            self._pending, held = (free, held) if free else (held[:1], held[1:])
        results = super().collect(wake)
        self._pending.extend(held)
        self.events.append(("collect", list(results)))
        return results


class ScriptedEngine(QueueEngine):
    """Answers requests with given tokens, in the order of submission; log-probabilities are -1, -2, ... per token."""

    def __init__(self, answers: list[list[int]]) -> None:
        super().__init__()
        self.answers = list(answers)

    def answer(self, request: SegmentRequest) -> SegmentResult:
        tokens = self.answers.pop(0)
        assert len(tokens) <= request.max_tokens, f"the script has {tokens} for {request}"
        reason = "length" if len(tokens) == request.max_tokens else "stop"
        return SegmentResult(request.request_id, tokens, [-1.0 - i for i in range(len(tokens))], reason)


class MarkovEngine(QueueEngine):
    """
    Samples from a Markov chain whose completions are known exactly.

    The first token after the prompt follows state 0; token t is state t, and EOS (0) ends. Results come at once.
    """

    TRANSITIONS = (
        (0.05, 0.55, 0.25, 0.15),  # from the prompt: to EOS, 1, 2, 3
        (0.10, 0.60, 0.25, 0.05),
        (0.02, 0.18, 0.50, 0.30),
        (0.30, 0.20, 0.10, 0.40),
    )
    reports_entropies = True

    def __init__(self, prompt_length: int, seed: int = 0) -> None:
        super().__init__()
        self.prompt_length = prompt_length
        self.rng = random.Random(seed)

    def answer(self, request: SegmentRequest) -> SegmentResult:
        state = 0 if len(request.token_ids) == self.prompt_length else request.token_ids[-1]
        tokens, logprobs, entropies = [], [], []
        while len(tokens) < request.max_tokens and (not tokens or tokens[-1] != EOS):
            row = self.TRANSITIONS[state]
            (state,) = self.rng.choices(range(len(row)), row)
            tokens.append(state)
            logprobs.append(math.log(row[state]))
            entropies.append(-sum(p * math.log(p) for p in row if p > 0))
        reason = "stop" if tokens[-1] == EOS else "length"
        return SegmentResult(request.request_id, tokens, logprobs, reason, entropies)

    @classmethod
    def exact(cls, cap: int) -> dict[str, float]:
        """
        Expected statistics of an independent completion of at most `cap` tokens, by summing over its length.

        `length`: its tokens, EOS included; `threes`: how many of them are 3; `from_three`: the probability that EOS
        comes and follows a 3 (a reward that depends on the end); `capped`: the probability of no EOS.
        """
        alive, values = [1.0, 0.0, 0.0, 0.0], {"length": 0.0, "threes": 0.0, "from_three": 0.0, "capped": 0.0}
        for _ in range(cap):
            values["length"] += sum(alive)
            values["from_three"] += alive[3] * cls.TRANSITIONS[3][0]
            alive = [0.0] + [sum(alive[i] * cls.TRANSITIONS[i][j] for i in range(4)) for j in (1, 2, 3)]
            values["threes"] += alive[3]
        values["capped"] = sum(alive)
        return values

    @staticmethod
    def observed(completion: list[int]) -> dict[str, float]:
        """The same statistics of one completion."""
        ended = completion[-1] == EOS
        return {
            "length": len(completion),
            "threes": completion.count(3),
            "from_three": float(ended and completion[-2:-1] == [3]),
            "capped": float(not ended),
        }
