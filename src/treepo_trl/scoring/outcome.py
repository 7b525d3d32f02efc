"""A batch that is scored: its advantages, its tree log, and its rows as the update takes them."""

from collections.abc import Callable

import torch
from accelerate.utils import gather_object

from treepo_trl.batch import TreeBatch
from treepo_trl.tree_log import tree_records, write_trees
from treepo_trl.trl.host import Host
from treepo_trl.update.row_advantages import mean_advantages, row_advantages


ROWS_PER_LEAF = "rows_per_leaf"
"""What a loss that averages over rows is too small by, among the values of a batch; absent where it is 1."""


def judged(
    batch: TreeBatch,
    output: dict[str, torch.Tensor],
    rewards: torch.Tensor,
    divisors: torch.Tensor,
    host: Host,
    decode: Callable[[list[int]], str],
) -> dict[str, torch.Tensor]:
    """
    The rows of a batch with the advantages of its trees, without what is vacant among them.

    Args:
        batch ([`TreeBatch`]):
            The trees.
        output (`dict[str, torch.Tensor]`):
            What `GRPOTrainer._generate_and_score_completions` returns.
        rewards (`torch.Tensor` of shape `(B,)`), divisors (`torch.Tensor` of shape `(B,)`):
            Reward of each row, and what its advantage is divided by.
        host ([`Host`]):
            Settings and logs.
        decode (`Callable[[list[int]], str]`):
            Text of a list of tokens, for the tree log.
    """
    args, output = host.args, dict(output)
    own_vacant = torch.tensor(batch.is_vacant)
    is_vacant = host.gathered(own_vacant)
    leaves_per_tree = batch.width * (~is_vacant).float().mean().item()
    if args.advantage_estimator != "grpo" or args.weights_leaves:
        estimator = args.advantage_estimator, args.weights_leaves, args.subgroup_rejection
        num_tokens = output["completion_ids"].size(1)
        output["advantages"] = row_advantages(batch.trees, rewards, divisors, num_tokens, *estimator, leaves_per_tree)
        host.log_advantages(host.gathered(mean_advantages(batch.rows(), output["advantages"])))
    if args.log_trees:
        values = batch.by_tree(rewards.tolist()), batch.by_tree(output["advantages"].tolist())
        records = gather_object(tree_records(batch.step, batch.trees, *values, decode))
        if host.accelerator.is_main_process:
            write_trees(records, str(args.output_dir), batch.step, is_first=batch.number == 0)
    if is_vacant.any():
        host.forget_rows(is_vacant.tolist())
        mask = output["completion_mask"]
        output["completion_mask"] = mask.masked_fill(own_vacant[:, None].to(mask.device), 0)
        if args.averages_rows:
            factor = batch.width / leaves_per_tree
            output["advantages"] = output["advantages"] * factor
            output[ROWS_PER_LEAF] = torch.tensor(factor, device=mask.device)
    return output
