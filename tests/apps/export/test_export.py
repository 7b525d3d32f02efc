"""Exports: the merged model says what the adapter does, appears whole or not at all, and needs neither PEFT nor us."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import CHAT_TEMPLATE
from tests.support.paths import ROOT
from tests.support.qlora import qlora
from tests.support.sample_runs import as_flags, save_adapter
from tests.support.segments import full_logprobs
from treepo_trl.apps.export import model as export_room
from treepo_trl.apps.export.command import main
from treepo_trl.policy.four_bit_base import write_quantization


PROMPT, COMPLETION = [10, 11], [12, 13, 14, 15, 16, 17]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: str) -> Path:
    """A working folder with a run that has ended: an adapter and the tokenizer that it was trained with."""
    monkeypatch.chdir(tmp_path)
    save_adapter(tiny_model_dir, "run")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{{ '<user> ' }}" + CHAT_TEMPLATE
    tokenizer.save_pretrained("run")
    return tmp_path / "run"


def export(name: str | Path, out: str = "out", **options: Any) -> None:
    main([str(name), "--out", out, *as_flags(options)])


def logprobs(model: Any) -> torch.Tensor:
    return full_logprobs(model.eval(), PROMPT, COMPLETION)


def test_the_exported_model_says_what_the_adapter_does(
    run: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    without = logprobs(base)
    expected = logprobs(PeftModel.from_pretrained(base, run))
    export(run)
    written = AutoModelForCausalLM.from_pretrained("out")
    torch.testing.assert_close(logprobs(written), expected, atol=1e-4, rtol=0)
    assert (expected - without).abs().max() > 0.5
    assert not any("lora" in name for name, _ in written.named_parameters())
    assert AutoTokenizer.from_pretrained("out").chat_template == "{{ '<user> ' }}" + CHAT_TEMPLATE
    settings = json.loads(Path("out/generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (0, 1)
    card = Path("out/README.md").read_text()
    assert "library_name: transformers" in card
    assert tiny_model_dir not in card  # a path means nothing elsewhere
    assert Path("out/Modelfile").read_text().splitlines()[1] == "FROM ."
    assert sorted(path.name for path in Path().iterdir()) == ["out", "run"]
    assert os.stat("out").st_mode & 0o777 == 0o777 & ~current_umask()
    told = capsys.readouterr().out
    assert "adapter    " in told
    assert "out: float32. Log-probabilities on a few texts are" in told
    assert "4 bits" not in told


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_tokenizer_of_the_base_is_of_its_revision(
    run: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once the tokenizer is asked for: without one beside the adapter it is the base's."""

    def load(name: str, **options: Any) -> Any:
        raise ValueError(f"{name} at {options.get('revision')}")

    for file in run.glob("tokenizer*"):
        file.unlink()
    monkeypatch.setattr(export_room.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(SystemExit, match=f"{tiny_model_dir} at v2"):
        export(run, model_revision="v2")


def test_a_checkpoint_is_exported_where_the_run_has_not_ended(run: Path, tiny_model_dir: str) -> None:
    """The newest one that is intact, with the tokenizer of its own folder."""
    state = json.dumps({"global_step": 3, "train_batch_size": 2})
    for step in (2, 3, 4):
        save_adapter(tiny_model_dir, f"other/checkpoint-{step}")
        if step < 4:
            Path(f"other/checkpoint-{step}/trainer_state.json").write_text(state)
    export("other", out="from-run")
    export("other/checkpoint-3", out="from-checkpoint")
    for name in ("from-run", "from-checkpoint"):
        assert f"{name}" in Path(name, "README.md").read_text()
    models = [AutoModelForCausalLM.from_pretrained(name) for name in ("from-run", "from-checkpoint")]
    assert torch.equal(*map(logprobs, models))


@pytest.mark.parametrize("said", ["by the training", "by the user"])
def test_a_4_bit_base_is_written_out_first(
    run: Path, tiny_model_dir: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter was trained on what its 4-bit weights stand for, and not on the checkpoint before it."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(3)
    policy = qlora(tiny_model_dir)
    policy.save_pretrained("qlora")
    expected = full_logprobs(policy, PROMPT, COMPLETION)
    options: dict[str, Any] = {"load_in_4bit": True, "use_bnb_nested_quant": True}
    if said == "by the training":
        write_quantization(policy, "qlora")
        options = {}
    export("qlora", **options)
    written = AutoModelForCausalLM.from_pretrained("out")
    assert not hasattr(written.config, "quantization_config")
    torch.testing.assert_close(logprobs(written), expected, atol=1e-4, rtol=0)
    assert "The base was in 4 bits (nf4) in training. It is written out first" in capsys.readouterr().out
    assert "4 bits" in Path("out/README.md").read_text()
    unquantized = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), "qlora")
    assert (logprobs(unquantized) - expected).abs().max() > 0.1


def test_a_merge_that_is_wrong_is_not_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_room, "_merged", lambda policy: policy.unload())  # forgets the adapter
    with pytest.raises(SystemExit, match=r"is not the base with its adapter.*differ by .* nats.*at most 0.0001"):
        export(run)
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


def test_an_adapter_on_shared_embeddings_is_found_to_be_unmergeable(run: Path, tiny_model_dir: str) -> None:
    """PEFT's head does not have the adapter of the embeddings that it shares; merged, it would."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained("tied")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained("tied")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained("tied"), config).save_pretrained("on-embeddings")
    with pytest.raises(SystemExit, match="An adapter on embeddings that the output head shares cannot be merged"):
        export("on-embeddings")
    assert not Path("out").exists()


def test_what_rounding_would_lose_is_told(run: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that changes weights by less than bfloat16 can hold."""
    policy: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), run)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-5
    policy.save_pretrained("small")
    export("small", dtype="bfloat16")
    assert "the export loses part of what was trained. `--dtype float32` keeps it." in capsys.readouterr().out


# Whole or not at all


def test_a_killed_export_leaves_nothing_under_its_name(run: Path) -> None:
    """Killed when all weights are written and none is checked; the next export removes what is left."""
    code = (
        "import sys, time; from treepo_trl.apps.export import model; from treepo_trl.apps.export.command import main\n"
        "def wait(*_): print('written', flush=True); time.sleep(300)\n"
        "model._check = wait; main(sys.argv[1:])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "--out", "out"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "written":
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path for path in Path().iterdir() if path.name != "run"]
    assert [path.name.startswith("treepo-trl-export-") for path in left] == [True]
    assert (left[0] / "model.safetensors").is_file()
    export(run)
    assert sorted(path.name for path in Path().iterdir()) == ["out", "run"]


@pytest.mark.parametrize("kind", ["folder", "file", "dead link"])
def test_nothing_is_written_over(run: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the base is loaded, and also if it appears meanwhile."""
    make = {
        "folder": lambda: Path("out").mkdir(),
        "file": lambda: Path("out").touch(),
        "dead link": lambda: Path("out").symlink_to("nowhere"),
    }[kind]
    monkeypatch.setattr(export_room, "_check", lambda *_: make())
    for _ in range(2):
        with pytest.raises(SystemExit, match="`--out out` exists already, and is not written over"):
            export(run)
    assert sorted(path.name for path in Path().iterdir()) == ["out", "run"]
    assert not Path("out", "config.json").exists()


def test_an_interrupt_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_room, "_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(run)
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


# Errors


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none", {}, "`none` is no folder. Name a run's `output_dir`"),
        ("empty", {}, "`empty` holds no adapter: neither `adapter_config.json` nor an intact checkpoint"),
        ("whole", {}, "`whole` holds a whole model and no adapter: there is nothing to merge"),
        ("prompts", {}, "is PROMPT_TUNING, which cannot be merged into a base"),
        ("unnamed", {}, "names no base. Give it as `--model_name_or_path`"),
        ("run", {"model_name_or_path": "wide"}, r"does not fit the base `wide`: .*lora_A.*It was for `.*tiny-model"),
        ("run", {"model_name_or_path": "./gone"}, "`--model_name_or_path ./gone` looks like a folder"),
        ("run", {"dtype": "int8"}, None),
        ("run-of-whole", {"model_name_or_path": "whole"}, "The tokenizer of `whole` makes no tokens of a text"),
        ("cut", {}, "The weights of the adapter `cut` cannot be read"),
    ],
)
def test_errors(
    run: Path, tiny_model_dir: str, name: str, options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    """In one line, and nothing is written."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    Path("empty").mkdir()
    base.config.save_pretrained("whole")
    config = type(base.config)(**{**base.config.to_dict(), "hidden_size": 128})
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained("wide")
    if name == "prompts":
        tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(base, tuning).save_pretrained(name)
    if name in ("unnamed", "cut", "run-of-whole"):
        save_adapter(tiny_model_dir, name)
    if name == "unnamed":
        path = Path(name, "adapter_config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    if name == "cut":
        path = Path(name, "adapter_model.safetensors")
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SystemExit) as error:
        export(name, **options)
    if message is not None:
        assert str(error.value.code).startswith("treepo-trl: error: ")
        assert "\n" not in str(error.value.code)
        assert re.search(message, str(error.value.code)), error.value.code
    assert not Path("out").exists()


@pytest.mark.parametrize("argv", [[], ["run"], ["--out", "out"]])
def test_both_names_are_needed(run: Path, argv: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^treepo-trl: error: (Name what to export|Say where the model)"):
        main(argv)


def test_adapters_of_other_kinds_are_merged_too(run: Path, tiny_model_dir: str) -> None:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    settings = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    policy: Any = get_peft_model(base, settings)
    for name, parameter in policy.named_parameters():
        if "ia3_" in name:
            parameter.data += 0.5 * torch.randn_like(parameter)
    policy.save_pretrained("ia3")
    export("ia3")
    written = AutoModelForCausalLM.from_pretrained("out")
    torch.testing.assert_close(logprobs(written), logprobs(policy), atol=1e-4, rtol=0)
