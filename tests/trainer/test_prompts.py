"""Prompts: conversations, stop patterns, iterable datasets."""

from pathlib import Path
from typing import Any

from datasets import IterableDataset

from tests.support.models import make_tokenizer
from tests.support.trainers import (
    SpyTrainer,
    chat_prompts,
    logs_of,
    make_config,
    parity_reward,
    plain_prompts,
    trained,
)


def test_stop_pattern_ends_conversational_paths(tmp_path: Path, tiny_model_dir: str) -> None:
    config = make_config(tmp_path, stop_pattern=r"w\d*5\b", max_steps=3)
    seen = []

    def reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return parity_reward(completion_ids)

    trainer = trained(SpyTrainer, tiny_model_dir, config, train_dataset=chat_prompts(), reward_funcs=reward)
    tokenizer = make_tokenizer()
    paths = [(tree, leaf) for trees in trainer.all_trees for tree in trees for leaf in tree.leaves]
    ended = 0
    for (tree, leaf), (prompt, completion) in zip(paths, seen, strict=True):
        assert tree.prompt_ids == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        text = tokenizer.decode(tree.completion_ids(leaf), skip_special_tokens=True)
        assert completion == [{"role": "assistant", "content": text}]
        words = text.split()
        matches = [i for i, word in enumerate(words) if word.startswith("w") and word.endswith("5")]
        if tree.nodes[leaf].finish_reason == "pattern":
            ended += 1
            assert matches == [len(words) - 1], words
        else:
            assert not [i for i in matches if i < len(words) - 1], words
    assert ended > 1
    decoded, unique = logs_of(trainer, "tree/decoded_tokens"), logs_of(trainer, "tree/unique_tokens")
    assert all(a >= b for a, b in zip(decoded, unique, strict=True))
    assert sum(decoded) > sum(unique)
    assert sum(logs_of(trainer, "tree/finish_pattern_frac")) > 0


def test_iterable_dataset(tmp_path: Path, tiny_model_dir: str) -> None:
    dataset = IterableDataset.from_generator(lambda: ({"prompt": p} for p in plain_prompts(4)["prompt"]))
    trainer = trained(SpyTrainer, tiny_model_dir, make_config(tmp_path, max_steps=3), train_dataset=dataset)
    assert trainer.state.global_step == 3
    tokenizer = make_tokenizer()
    for generation in trainer.generations:
        prompts = [row["prompt"] for row in generation["inputs"]]
        assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4
        assert [tree.prompt_ids for tree in generation["trees"]] == tokenizer(prompts[::4])["input_ids"]
