"""
A packed row through a model whose parameters two processes share (FSDP2).

Accelerate starts FSDP only on accelerators, so torch's own `fully_shard` wraps the model here.
"""

from pathlib import Path

from tests.support.processes import run_in_two_processes


SCRIPT = """
import json
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from tests.support import rows

folder = sys.argv[1]
distributed.init_process_group("gloo")
rank = distributed.get_rank()
ids, mask, num_scored = rows.trees(2)
own = slice(4 * rank, 4 * rank + 4)
batch = ids[own], mask[own], num_scored  # a tree for each process


def gradients(model, forward):
    model.zero_grad()
    logps = forward(model)
    (logps * torch.linspace(0, 1, logps.numel()).view_as(logps)).sum().backward()
    return {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}


whole = rows.ready_model()
expected = gradients(whole, lambda model: rows.plain(model, *batch)[0] * batch[1][:, -num_scored:])
for gradient in expected.values():  # what data parallel training makes of them
    distributed.all_reduce(gradient)
    gradient /= 2

results = []
for checkpointing in (False, True):
    sharded = rows.ready_model()
    if checkpointing:
        sharded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sharded.train()
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    forward = rows.make_forward("sdpa", is_sharded=True)
    found = gradients(sharded, lambda model: rows.run(forward, model, batch)[0])
    assert expected.keys() == found.keys()
    worst = max((found[n] - expected[n]).abs().max().item() / expected[n].abs().max().item() for n in expected)
    results.append({"worst": worst, "sharded": str(type(next(sharded.parameters())).__name__)})
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(results, file)
distributed.destroy_process_group()
"""


def test_gradients_are_those_of_plain_rows_with_and_without_checkpointing(tmp_path: Path) -> None:
    for rank in run_in_two_processes(SCRIPT, tmp_path, str(tmp_path)):
        assert [result["sharded"] for result in rank] == ["DTensor", "DTensor"]
        assert max(result["worst"] for result in rank) < 1e-4, rank
