"""Classes of transformers that vLLM changes in place, given back to the policy."""

import inspect

import torch


def give_classes_back(policy: torch.nn.Module) -> None:
    """
    Let a policy run, and models of its classes be built, beside a vLLM engine in the same process.

    Families that vLLM has no code of its own for (SmolLM3, OLMo 3) are served by transformers' class, which vLLM
    changes for everybody. Each instance must then be built in vLLM's context and say whether it is compiled. The
    engine's instance is built already and says so by itself.

    Args:
        policy (`torch.nn.Module`):
            The policy, wrapped or not.
    """
    for changed in {type(module) for module in policy.modules()}:
        is_changed = any(base.__module__ == "vllm.compilation.wrapper" for base in changed.__bases__)
        if is_changed and "do_not_compile" not in vars(changed):
            changed.do_not_compile = True  # pyright: ignore[reportAttributeAccessIssue] - of instances that do not say
            changed.__init__ = inspect.getclosurevars(changed.__init__).nonlocals["old_init"]
