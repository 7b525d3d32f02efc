"""What `treepo-trl eval` asks: presets, data of the user's own, reasoning-gym, the packaged tasks."""

from typing import Any, cast

import pytest
from datasets import Dataset, DatasetDict

from treepo_trl.apps.eval import data as eval_data


pytestmark = pytest.mark.usefixtures("prompts_folder")


# What goes in


def test_presets_read_the_columns_of_their_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the columns of each stands in for the hub."""
    rows = {
        "gsm8k": {"question": ["How many?"], "answer": ["Work it out: 8 * 9 = 72\n#### 72"]},
        "math500": {"problem": ["How many?"], "solution": ["$8 * 9$"], "answer": ["72"], "subject": ["a"]},
        "aime": {"id": [60], "problem": ["How many?"], "solution": ["8 * 9"], "answer": ["072"], "year": ["2024"]},
    }
    for name, columns in rows.items():
        preset = eval_data.PRESETS[name]
        DatasetDict({preset.split: Dataset.from_dict(columns)}).save_to_disk(name)
        stand_in = eval_data.Preset(f"./{name}", None, preset.split, preset.question, preset.answer, preset.separator)
        monkeypatch.setitem(eval_data.PRESETS, name, stand_in)
        loaded = eval_data.load_eval_set(eval_data.EvalArguments(dataset_name=name))
        (prompt,) = loaded.prompts
        assert isinstance(prompt, list)
        assert prompt[0]["content"].startswith("How many?\n\n")
        assert loaded.judge is not None
        assert loaded.judge(0, r"It is \boxed{72}").is_right
        assert not loaded.judge(0, r"It is \boxed{8}").is_right


def test_the_split_of_a_preset_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {name: Dataset.from_dict({"question": [name], "answer": ["#### 1"]}) for name in ("test", "train")}
    DatasetDict(splits).save_to_disk("gsm8k")
    monkeypatch.setitem(
        eval_data.PRESETS, "gsm8k", eval_data.Preset("./gsm8k", None, "test", "question", "answer", "####")
    )
    for split, expected in ((None, "test"), ("train", "train")):
        loaded = eval_data.load_eval_set(eval_data.EvalArguments(dataset_name="gsm8k", dataset_split=split))
        assert str(cast(Any, loaded.prompts[0])[0]["content"]).startswith(expected)
    with pytest.raises(ValueError, match=r"no split 'dev', only test, train\. Set `--dataset_split`"):
        eval_data.load_eval_set(eval_data.EvalArguments(dataset_name="gsm8k", dataset_split="dev"))


def test_reasoning_gym_scores_its_own_answers() -> None:
    settings = '{"min_terms": 2, "max_terms": 2, "seed": 3}'
    loaded = eval_data.load_eval_set(
        eval_data.EvalArguments(dataset_name="reasoning_gym:chain_sum", dataset_config=settings, max_prompts=5)
    )
    assert len(loaded.prompts) == 5
    assert loaded.judge is not None
    for i, answer in enumerate(loaded.columns["answer"]):
        assert loaded.judge(i, f"Hm. <answer>{answer}</answer>").is_right
        assert loaded.judge(i, f"Hm. {answer}").score == 0
        assert loaded.judge(i, "<answer>no</answer>").answer == "no"


def test_the_packaged_tasks_are_those_that_the_quickstart_holds_out() -> None:
    from treepo_trl.quickstart import addition_tasks
    from treepo_trl.quickstart.command import QuickstartArguments

    train, held_out = addition_tasks(160, QuickstartArguments().num_held_out, 42)
    everything = eval_data.load_eval_set(eval_data.EvalArguments(dataset_name="addition"))
    assert everything.prompts == list(held_out["prompt"])
    assert not any(prompt in list(train["prompt"]) for prompt in everything.prompts)
    loaded = eval_data.load_eval_set(eval_data.EvalArguments(dataset_name="addition", max_prompts=8))
    assert loaded.prompts == everything.prompts[:8]
    assert loaded.judge is not None
    assert loaded.judge(0, f"1 + 1 = {loaded.columns['answer'][0]}").is_right
