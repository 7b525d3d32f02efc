"""
Every name of TRL that is replaced while one of its methods runs, with the reason and what would end it.

TRL 1.16 builds and calls these names itself and takes no argument for them. Each is replaced for one call and put
back, also after an error. `tests/trl/test_seams.py` tests that TRL still looks them up there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer, RewardFunc


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """
    Replace an attribute of a module or an object for a block.

    Raises:
        AttributeError: if the owner does not have the name any more.
    """
    original, is_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:  # an object's class has it
            delattr(owner, name)


def vllm_generation_class(build: Callable[..., object]) -> AbstractContextManager[None]:
    """
    What `GRPOTrainer.__init__` builds in place of `VLLMGeneration`.

    Why: TRL merges the adapter into the base and pushes every weight; the adapter alone is smaller and exact.
    Ends with adapter-only synchronization in TRL: huggingface/trl#5975, #6007.
    """
    return replaced(grpo_trainer, "VLLMGeneration", build)


def engine_class(llm: type) -> AbstractContextManager[None]:
    """
    The class that `VLLMGeneration._init_vllm` builds in place of `vllm.LLM`.

    Why: it gives the engine no LoRA options, and puts the engine to a sleep that LoRA layers do not survive.
    Ends with huggingface/trl#5975 too, or with an argument for the engine's options.
    """
    return replaced(vllm_generation, "LLM", llm)


def environment_pools(trainer: GRPOTrainer, pools: object) -> AbstractContextManager[None]:
    """
    Where `GRPOTrainer._generate_and_score_completions` takes the environment of each row from.

    Why: it resets one per row; a tree is reset once, and its paths get environments when they part.
    No upstream request is open. A method that gives a row its environment would end it.
    """
    return replaced(trainer, "_environment_pool", pools)


def row_shuffle(shuffle: Callable[[dict[str, object]], dict[str, object]]) -> AbstractContextManager[None]:
    """
    How `GRPOTrainer._prepare_inputs` shuffles the rows of a generation batch.

    Why: it shuffles single rows before it cuts micro-batches, which would part rows that share prefixes.
    No upstream request is open. A method in place of the function would end it.
    """
    return replaced(grpo_trainer, "shuffle_sequence_dict", shuffle)


def calculated_rewards(
    trainer: GRPOTrainer, wrap: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]
) -> AbstractContextManager[None]:
    """
    What `GRPOTrainer._generate_and_score_completions` calls as `_calculate_rewards`: that method, wrapped.

    Why: TRL turns the rewards into advantages without handing them out. The wrapper is put around the method from
    outside, so that it sees what a subclass makes of the rewards in an override of its own.
    Ends with a method for advantages in TRL: huggingface/trl#7291.
    """
    return replaced(trainer, "_calculate_rewards", wrap(trainer._calculate_rewards))


def generated(
    trainer: GRPOTrainer, wrap: Callable[[Callable[..., tuple[object, ...]]], Callable[..., tuple[object, ...]]]
) -> AbstractContextManager[None]:
    """
    What `GRPOTrainer._generate_and_score_completions` calls as `_generate`: that method, wrapped.

    Why: it logs lengths of all rows, and rows that stand for no leaf are none of them.
    Ends with groups of different sizes in TRL; no upstream request is open.
    """
    return replaced(trainer, "_generate", wrap(trainer._generate))


def no_correction(trainer: GRPOTrainer) -> AbstractContextManager[None]:
    """
    Whether `GRPOTrainer._generate_and_score_completions` compares the policy with vLLM.

    Why: it forwards the batch for that, and the update forwards it again with the same policy.
    Ends with a ratio from the update's log-probabilities in TRL, as it has the old ones without vLLM.
    """
    return replaced(trainer, "vllm_importance_sampling_correction", False)


def kl_weight(trainer: GRPOTrainer, beta: float) -> AbstractContextManager[None]:
    """
    The weight of the KL term in `GRPOTrainer._compute_loss`.

    Why: some losses average over rows, those that stand for no leaf included.
    Ends with groups of different sizes in TRL; no upstream request is open.
    """
    return replaced(trainer, "beta", beta)


def reward_funcs(trainer: GRPOTrainer, functions: list[RewardFunc]) -> AbstractContextManager[None]:
    """
    The reward functions that `GRPOTrainer._calculate_rewards` calls.

    Why: it does not say which of them raised, hangs, or gave what is no reward. For the call alone, so that users and
    subclasses find their own functions in the trainer.
    No upstream request is open.
    """
    return replaced(trainer, "reward_funcs", functions)


def metrics_aside(trainer: GRPOTrainer) -> AbstractContextManager[None]:
    """
    The metrics that `GRPOTrainer._generate` logs, thrown away.

    Why: dynamic sampling generates for prompts of which most may yet be replaced; what is chosen is logged once.
    Ends with dynamic sampling in TRL: huggingface/trl#3708.
    """
    return replaced(trainer, "_metrics", {"train": defaultdict(list)})


def train_dataset(trainer: GRPOTrainer, dataset: torch.utils.data.Dataset) -> AbstractContextManager[None]:
    """
    The dataset that `GRPOTrainer.get_train_dataloader` reads.

    Why: dynamic sampling draws the prompts itself, and the data loader only counts steps.
    Ends with huggingface/trl#3708 too.
    """
    return replaced(trainer, "train_dataset", dataset)
