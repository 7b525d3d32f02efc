"""
The private parts of TRL that this package relies on. A failure here means: TRL has moved, read its diff before the
version bound in pyproject.toml is widened.
"""

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_config, grpo_trainer

import treepo_trl
from tests.support.paths import ROOT
from tests.support.trainers import make_config
from treepo_trl import TreePOConfig, TreePOTrainer, trl_seams
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration
from treepo_trl.policy.servers.generation import ServerGeneration
from treepo_trl.settings.grpo import CHOICES


# Parameters as in a definition, without annotations.
SIGNATURES = {
    "_generate_single_turn": "self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False",
    "_tool_call_loop": ("self, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields"),
    "_generate_and_score_completions": "self, inputs",
    "_get_per_token_logps_and_entropies": (
        "self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, "
        "compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, pixel_attention_mask=None, "
        "spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, mm_token_type_ids=None, "
        "image_position_ids=None"
    ),
    "_prepare_inputs": "self, generation_batch",
    "_calculate_rewards": "self, inputs, prompts, completions, completion_ids_list",
    "_save_checkpoint": "self, model, trial",
    "_save": "self, output_dir=None, state_dict=None",
    "_load_from_checkpoint": "self, resume_from_checkpoint, model=None",
    "get_train_dataloader": "self",
    "get_batch_samples": "self, epoch_iterator, num_batches, device",
    "train": "self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None",
}
# What dynamic sampling and turns call, or replace for a call.
CALLED = {
    "_generate": "self, prompts",
    "_tokenize_prompts": "self, prompts",
    "_get_train_sampler": "self, dataset=None",
    "_get_collator_with_removed_columns": "self, data_collator, description=None",
    "_get_tool_suffix_ids": "self, tool_messages",
}
INIT_PARAMETERS = (
    "self, model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, "
    "reward_processing_classes=None, callbacks=None, optimizers=(None, None), quantization_config=None, "
    "peft_config=None, tools=None, rollout_func=None, environment_factory=None"
)
VLLM_SIGNATURES = {
    "_init_vllm": "self",
    "sync_weights": "self",
    "generate": "self, prompts, images, num_generations, profiler=None",
}


def parameters(function: Callable[..., Any]) -> dict[str, str]:
    """Each parameter as in a definition, without annotations."""
    values = inspect.signature(function).parameters.values()
    return {p.name: p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in values}


def written(function: Callable[..., Any]) -> str:
    return ", ".join(parameters(function).values())


def overridden_methods(cls: type, base: type) -> set[str]:
    return {name for name, value in vars(cls).items() if inspect.isfunction(value) and hasattr(base, name)}


def test_version() -> None:
    assert trl.__version__.startswith("1.16.")


def test_every_override_is_pinned() -> None:
    assert overridden_methods(TreePOTrainer, GRPOTrainer) == {*SIGNATURES, "__init__"}


@pytest.mark.parametrize(("name", "signature"), [*SIGNATURES.items(), *CALLED.items(), ("__init__", INIT_PARAMETERS)])
def test_signature_in_trl(name: str, signature: str) -> None:
    assert written(getattr(GRPOTrainer, name)) == signature


@pytest.mark.parametrize("name", SIGNATURES)
def test_override_takes_what_trl_passes(name: str) -> None:
    """Same names, order and defaults; a `**kwargs` may take the rest."""
    override = getattr(TreePOTrainer, name)
    kinds = [p.kind for p in inspect.signature(override).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        assert SIGNATURES[name].startswith(", ".join([*parameters(override).values()][:-1]) + ", ")
    else:
        assert written(override) == SIGNATURES[name]


def test_results_of_what_is_called() -> None:
    """By position: the third of what `_generate` returns is the tool mask, the fourth are the completions."""
    source = inspect.getsource(GRPOTrainer._generate)
    assert "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields" in source


def test_results_of_the_tool_loop() -> None:
    """Seven, in this order, as `TreePOTrainer` gives them; asked for only where there are tools."""
    source = inspect.getsource(GRPOTrainer._tool_call_loop)
    assert (
        "return tool_mask, completions, completion_ids, logprobs, tool_call_count, tool_failure_count, tool_images"
        in source
    )
    assert "if self.tools:\n            (\n                tool_mask," in inspect.getsource(GRPOTrainer._generate)


def test_init_takes_what_trl_takes() -> None:
    assert written(TreePOTrainer.__init__) == INIT_PARAMETERS


def test_config_takes_every_field_of_trl() -> None:
    assert written(TreePOConfig).startswith(written(GRPOConfig) + ", ")


def called_names(function: Callable[..., Any]) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {
        call.id if isinstance(call, ast.Name) else call.attr
        for call in calls
        if isinstance(call, ast.Name | ast.Attribute)
    }


@pytest.mark.parametrize(
    ("name", "user"),
    [("VLLMGeneration", GRPOTrainer.__init__), ("shuffle_sequence_dict", GRPOTrainer._prepare_inputs)],
)
def test_replaced_names_are_looked_up_in_the_module(name: str, user: Callable[..., Any]) -> None:
    """`replaced` puts something else under these names: they must exist and be called by that name."""
    assert hasattr(grpo_trainer, name)
    assert name in called_names(user)


def test_names_are_replaced_in_one_file() -> None:
    package = Path(treepo_trl.__file__).parent
    using = {path.name for path in package.rglob("*.py") if re.search(r"\b(replaced|setattr)\(", path.read_text())}
    assert using == {"trl_seams.py"}


def test_environments_come_from_the_pool() -> None:
    """By length and index alone, before anything is sampled; rewards read them from the trainer afterwards."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for line in (
        "pool = self._environment_pool[name]",
        "if index == len(pool):",
        "self.environments.append(pool[index])",
        "observation = environment.reset(**reset_kwargs)",
    ):
        assert source.index(line) < source.index("self._generate(prompts)"), line
    assert 'reward_kwargs["environments"] = self.environments' in inspect.getsource(GRPOTrainer._calculate_rewards)
    assert "self._batch_environments" in inspect.getsource(GRPOTrainer._tokenize_prompts)


def test_replaced_attributes_are_read_from_the_trainer() -> None:
    assert "self.train_dataset" in inspect.getsource(GRPOTrainer.get_train_dataloader)
    assert "self._metrics[mode]" in inspect.getsource(GRPOTrainer._generate)


def test_replaced_llm_is_looked_up_in_the_module() -> None:
    assert "LLM" in called_names(VLLMGeneration._init_vllm)
    assert "LLM" in inspect.getsource(vllm_generation)


def test_replaced_shuffle_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is resolved when the method runs, not bound earlier."""
    seen = []
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda batch: seen.append(batch) or batch)

    class Fake:
        model = torch.nn.Linear(1, 1)
        num_iterations = 1
        _step = 0
        _buffered_inputs = None
        args = type("Args", (), {"steps_per_generation": 1})()

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return {"completion_ids": torch.zeros(2, 1)}

    inspect.unwrap(GRPOTrainer._prepare_inputs)(Fake(), {})
    assert len(seen) == 1


def test_callers_use_the_overrides() -> None:
    """The overridden methods are on the path from a training step to the loss."""
    assert "_generate_single_turn" in called_names(GRPOTrainer._generate)
    scoring = called_names(GRPOTrainer._generate_and_score_completions)
    assert {"_generate", "_calculate_rewards", "_get_per_token_logps_and_entropies"} <= scoring
    assert "_get_per_token_logps_and_entropies" in called_names(GRPOTrainer._compute_loss)
    assert "_generate_and_score_completions" in called_names(GRPOTrainer._prepare_inputs)


def test_loss_takes_advantages_per_token() -> None:
    """TRL keeps two-dimensional advantages as they are."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert 'advantages = inputs["advantages"]' in source
    assert "if advantages.dim() == 1:" in source


def test_attributes_that_the_trainer_reads() -> None:
    source = inspect.getsource(GRPOTrainer.__init__)
    names = (
        "_last_loaded_step vllm_generation generation_kwargs _dist _logs _metrics _pending_extra_logs _step "
        "_tokenizer eos_token_ids reward_weights scale_rewards multi_objective_aggregation num_generations use_vllm "
        "tools _standalone_tools _env_tools _environment_pool environment_factories environments _multi_environment "
        "max_tool_calling_iterations num_generations_eval"
    )
    for name in names.split():
        assert f"self.{name} = " in source or f"self.{name}:" in source, name


@pytest.mark.parametrize("name", VLLM_SIGNATURES)
def test_vllm_generation_signatures(name: str) -> None:
    assert written(getattr(VLLMGeneration, name)) == VLLM_SIGNATURES[name]


def test_adapter_generation_overrides_no_more() -> None:
    assert overridden_methods(AdapterVLLMGeneration, VLLMGeneration) == {"__init__", "_init_vllm", "sync_weights"}
    for name in ("_init_vllm", "sync_weights"):
        assert written(getattr(AdapterVLLMGeneration, name)) == VLLM_SIGNATURES[name]
    source = inspect.getsource(VLLMGeneration)
    for name in ("_llm_weights_sleeping", "enable_sleep_mode", "llm", "_dist", "model"):
        assert f"self.{name} = " in source, name


def test_server_generation_overrides_all_that_the_trainer_calls() -> None:
    """TRL's own would open a client; of that the trainer asks one thing more."""
    assert overridden_methods(ServerGeneration, VLLMGeneration) == {"__init__", *VLLM_SIGNATURES}
    for name, signature in VLLM_SIGNATURES.items():
        assert written(getattr(ServerGeneration, name)) == signature
    source = inspect.getsource(GRPOTrainer)
    assert source.count("vllm_client") == source.count("vllm_client.get_server_info()") == 1
    assert set(re.findall(r"self\.vllm_generation\.(\w+)", source)) <= {"vllm_client", "llm", *VLLM_SIGNATURES}


def test_parameters_of_the_vllm_generation_that_the_trainer_builds() -> None:
    names = {"model", "accelerator", "mode", "enable_sleep_mode", "max_model_length", "max_num_seqs", "logprobs"}
    assert names <= set(parameters(VLLMGeneration.__init__))


def test_choices_are_those_that_the_source_of_trl_compares_with() -> None:
    source = inspect.getsource(grpo_trainer) + inspect.getsource(grpo_config)
    for name, choices in CHOICES.items():
        found = set(re.findall(rf'{name} [!=]= "(\w+)"', source))
        for values in re.findall(rf"{name} (?:not )?in [\[({{]([^\])}}]*)", source):
            found.update(re.findall(r'"(\w+)"', values))
        assert name == "vllm_model_impl" or found == set(choices)  # which vLLM alone looks at


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_type", "gpro"), ("loss_type", None), ("scale_rewards", "False"), ("vllm_mode", "sever")],
)
def test_other_choices_are_refused_before_a_model_is_loaded(name: str, value: str | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is {value!r}\. Choose one of '"):
        make_config(tmp_path, **{name: value})


def test_older_values_of_scale_rewards_are_taken(tmp_path: Path) -> None:
    assert [make_config(tmp_path, scale_rewards=value).scale_rewards for value in (True, False)] == ["group", "none"]


# The list of seams in the documentation

CODE_MAP = (ROOT / "docs/code-map.md").read_text(encoding="utf-8")


def rows_below(sentence: str, text: str = CODE_MAP) -> list[list[str]]:
    """Cells of the table that follows a sentence, its two heading lines left out."""
    following = text[text.index(sentence) :].splitlines()
    first = next(i for i, line in enumerate(following) if line.startswith("|"))
    table = list(itertools.takewhile(lambda line: line.startswith("|"), following[first:]))
    return [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[2:]]


def overrides_in_policy() -> set[tuple[str, str]]:
    """Class and method of everything in `policy/` that stands in for a class of TRL or vLLM, or for such a class."""
    classes, foreign = {}, set()
    for path in (Path(treepo_trl.__file__).parent / "policy").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("trl", "vllm"):
                foreign |= {alias.name for alias in node.names}
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = set()
    for _ in classes:  # as deep as classes go
        heirs = {name for name, node in classes.items() if foreign & {ast.unparse(base) for base in node.bases}}
        foreign |= heirs
        found |= {(name, f.name) for name in heirs for f in classes[name].body if isinstance(f, ast.FunctionDef)}
    return found


def test_overrides_of_the_trainer_are_listed() -> None:
    rows = rows_below("is the only file that overrides private methods")
    assert {name for name, _, _ in rows} == set(SIGNATURES)


def test_replaced_names_are_listed() -> None:
    defined = {
        name for name, value in vars(trl_seams).items() if getattr(value, "__module__", "") == trl_seams.__name__
    }
    assert {name for name, _, _ in rows_below("`trl_seams.py` replaces names")} == defined - {"replaced"}


def test_overrides_around_the_engine_are_listed() -> None:
    classes = {AdapterVLLMGeneration: VLLMGeneration, ServerGeneration: VLLMGeneration}
    own = {name for cls, base in classes.items() for name in vars(cls) if not hasattr(base, name)}
    overrides = {(name, method) for name, method in overrides_in_policy() if method not in {"__init__", *own}}
    assert ("KeepWeightsWorker", "_maybe_get_memory_pool_context") in overrides
    assert {(name, method) for name, method, _, _ in rows_below("`policy/` overrides methods")} == overrides


def test_each_seam_has_an_end() -> None:
    rows = [
        *rows_below("is the only file that overrides private methods"),
        *rows_below("`trl_seams.py` replaces names"),
        *rows_below("`policy/` overrides methods"),
    ]
    assert all(cell for row in rows for cell in row)
    code = set(re.findall(r"#(\d+)", inspect.getsource(trl_seams)))
    listed = {number for row in rows for number in re.findall(r"trl#(\d+)", row[-1])}
    assert listed == code
