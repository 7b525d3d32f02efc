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
import trl
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_config, grpo_trainer

import treepo_trl
from tests.support.paths import ROOT
from tests.support.trainers import make_config
from treepo_trl import TreePOConfig, TreePOTrainer
from treepo_trl.policy.adapter_sync import AdapterVLLMGeneration
from treepo_trl.servers.generation import ServerGeneration
from treepo_trl.settings.grpo import CHOICES
from treepo_trl.trl import seams
from treepo_trl.trl.generation import OwnGeneration


PACKAGE = Path(treepo_trl.__file__).parent

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
    "compute_loss": "self, model, inputs, return_outputs=False, num_items_in_batch=None",
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
    using = {path.name for path in PACKAGE.rglob("*.py") if re.search(r"\b(replaced|setattr)\(", path.read_text())}
    assert using == {"seams.py"}


def test_replaced_llm_is_looked_up_in_the_module() -> None:
    assert "LLM" in called_names(VLLMGeneration._init_vllm)
    assert "LLM" in inspect.getsource(vllm_generation)


HOLDERS = {
    PACKAGE / "treepo_trainer.py": "self",
    PACKAGE / "trl/host.py": "trainer",
    PACKAGE / "trl/seams.py": "trainer",
}


def private_names(path: Path, holder: str) -> set[str]:
    """Names with one underscore that a file asks of `holder` or `self.holder`."""
    attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return {
        node.attr
        for node in attributes
        if re.match(r"_[a-z]", node.attr) and re.fullmatch(rf"(.+\.)?{holder}", ast.unparse(node.value))
    }


def test_private_names_are_those_of_trl() -> None:
    """Every one that is read or set exists in TRL or transformers, or is made by this trainer itself."""
    source = inspect.getsource(GRPOTrainer) + "".join(inspect.getsource(base) for base in GRPOTrainer.__mro__[1:3])
    used = set.union(*(private_names(PACKAGE / file, holder) for file, holder in HOLDERS.items()))
    own = set(re.findall(r"self\.(_\w+)(?:, self\._\w+)* =", inspect.getsource(TreePOTrainer.__init__)))
    own |= {"_evaluation_metrics"} | {name for name in vars(TreePOTrainer) if not hasattr(GRPOTrainer, name)}
    missing = {n for n in used - own if not hasattr(GRPOTrainer, n) and not re.search(rf"self\.{n}(:| =)", source)}
    assert len(used - own) > 20
    assert missing == set()


def test_no_other_file_has_private_names_of_a_trainer() -> None:
    others = {*PACKAGE.rglob("*.py")} - {PACKAGE / file for file in HOLDERS}
    found = {
        (path.name, name)
        for path in others
        for held in ("trainer", "host.trainer")
        for name in private_names(path, held)
    }
    assert found == set()


@pytest.mark.parametrize("name", VLLM_SIGNATURES)
def test_vllm_generation_signatures(name: str) -> None:
    assert written(getattr(VLLMGeneration, name)) == VLLM_SIGNATURES[name]


def test_adapter_generation_overrides_no_more() -> None:
    assert overridden_methods(OwnGeneration, VLLMGeneration) == {"_init_vllm"}
    assert overridden_methods(AdapterVLLMGeneration, OwnGeneration) == {"__init__", "start", "sync_weights"}
    for name in ("_init_vllm", "sync_weights"):
        assert written(getattr(AdapterVLLMGeneration, name)) == VLLM_SIGNATURES[name]
    source = inspect.getsource(VLLMGeneration)
    assert hasattr(VLLMGeneration, "_iter_named_params")
    for name in ("_llm_weights_sleeping", "enable_sleep_mode", "llm", "_dist", "model"):
        assert f"self.{name} = " in source, name


def test_server_generation_overrides_all_that_the_trainer_calls() -> None:
    """TRL's own would open a client; of that the trainer asks one thing more."""
    assert overridden_methods(ServerGeneration, OwnGeneration) == {"__init__", "start", "sync_weights", "generate"}
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
    ("name", "value"), [("loss_type", "gpro"), ("loss_type", None), ("scale_rewards", "False"), ("vllm_mode", "sever")]
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


def overrides_around_the_engine() -> set[tuple[str, str]]:
    """Class and method of everything around the engine that stands in for a class of TRL or vLLM."""
    classes, foreign = {}, set()
    for path in (path for room in ("trl", "policy", "servers") for path in (PACKAGE / room).rglob("*.py")):
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


def test_each_replaced_name_has_a_reason_and_an_end() -> None:
    replacements = [value for value in vars(seams).values() if getattr(value, "__module__", "") == seams.__name__]
    replacements.remove(seams.replaced)
    assert len(replacements) > 5
    for replacement in replacements:
        text = inspect.getdoc(replacement)
        assert "\nWhy: " in text, replacement
        assert re.search("\n(Ends with|No upstream request is open)", text), replacement


def test_overrides_around_the_engine_are_listed() -> None:
    classes = {OwnGeneration: VLLMGeneration, AdapterVLLMGeneration: OwnGeneration, ServerGeneration: OwnGeneration}
    own = {name for cls, base in classes.items() for name in vars(cls) if not hasattr(base, name)}
    overrides = {(name, method) for name, method in overrides_around_the_engine() if method not in {"__init__", *own}}
    assert ("KeepWeightsWorker", "_maybe_get_memory_pool_context") in overrides
    assert {(name, method) for name, method, _, _ in rows_below("override methods around the engine")} == overrides


def test_each_seam_has_an_end() -> None:
    rows = [
        *rows_below("is the only file that overrides private methods"),
        *rows_below("override methods around the engine"),
    ]
    assert all(cell for row in rows for cell in row)
