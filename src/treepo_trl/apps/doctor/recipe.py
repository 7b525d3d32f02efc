"""The recipe that is asked about, from the options of a training; without one, a training that needs everything."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from trl import ModelConfig

from treepo_trl.apps.train.adapter import starting_adapter
from treepo_trl.command_line.arguments import OptionsParser
from treepo_trl.preflight import check_config, check_options, require_model
from treepo_trl.preflight.config_file import config_of, split_words
from treepo_trl.quickstart import small_model
from treepo_trl.quickstart.model import default_folder
from treepo_trl.treepo_config import TreePOConfig


if TYPE_CHECKING:
    from peft import PeftConfig


NumberType = Literal["bfloat16", "float16", "float32"]
EVERYTHING = ["--use_vllm", "true", "--use_peft", "true", "--lora_target_modules", "all-linear", "--dtype", "auto"]
"""Options of what is checked without a recipe: LoRA and vLLM, in the type of the model."""


@dataclass(frozen=True)
class Recipe:
    """
    A training as its options say it.

    Attributes:
        step_model (`str`):
            Folder or hub name of the model that the small step is made on.
        training ([`TreePOConfig`]), model ([`~trl.ModelConfig`]):
            Settings. The number type has a check of its own, and is none here.
        adapter ([`~peft.PeftConfig`], *optional*):
            The adapter that the training goes on from.
        tools (`list[str]`, *optional*), environment (`str`, *optional*):
            Import paths, which are not imported here.
        number_type (`str`, *optional*):
            What it computes in; `None` without a recipe: then any type will do.
        use_cpu (`bool`):
            Whether it is to run on the processor.
        card_gib (`float`, *optional*):
            The card that it is planned for, if that is not here.
    """

    step_model: str
    training: TreePOConfig
    model: ModelConfig
    adapter: "PeftConfig | None" = None
    tools: list[str] | None = None
    environment: str | None = None
    number_type: NumberType | None = None
    use_cpu: bool = False
    card_gib: float | None = None

    @property
    def is_given(self) -> bool:
        """Whether a recipe says what is needed. Else everything is."""
        return self.number_type is not None

    @property
    def device(self) -> torch.device:
        """Where the training would compute."""
        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, a new one or one that is given."""
        return self.model.use_peft or self.adapter is not None

    @property
    def has_servers(self) -> bool:
        """Whether vLLM servers sample, and not this machine."""
        return self.training.use_vllm and self.training.vllm_mode == "server"

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM samples in this process."""
        return self.training.use_vllm and not self.has_servers

    @property
    def packages(self) -> list[str]:
        """Packages that must be installed."""
        training, model = self.training, self.model
        in_4bit = model.load_in_4bit or not self.is_given
        engine_in_4bit = training.vllm_base_weights == "quantized" or training.vllm_share_base_weights
        has_8bit = model.load_in_8bit or any(word in str(training.optim).lower() for word in ("8bit", "bnb"))
        optional = {
            "peft": self.has_adapter,
            "vllm": training.use_vllm,  # with servers too: TRL wants it beside its trainer
            "bitsandbytes": in_4bit or has_8bit,
            "vllm-bnb-plugin": self.uses_vllm and in_4bit and (engine_in_4bit or not self.is_given),
        }
        return ["torch", "trl", "transformers", "accelerate", *(name for name, needed in optional.items() if needed)]


def read(parser: OptionsParser, argv: list[str]) -> Recipe:
    """
    The recipe of a command line; what needs everything, if it has no options of a training.

    Raises:
        ValueError: for options that a training would not take, or a model that is not there.
    """
    words = split_words(argv)
    file = config_of(parser, words)
    in_file = {} if file is None else check_config(file)
    start = len(words) if file is None else words.index("--config")
    on_line = check_options(parser, words[:start] + words[start + 2 :])
    is_given = file is not None or bool(on_line.keys() - {"model_name_or_path", "json", "card_gib"})
    if "card_gib" in on_line and not is_given:
        raise ValueError("`--card_gib` is for the plan of a recipe. Add `--config`, or leave it out.")
    named = on_line.get("model_name_or_path")
    step_model = require_model(str(named)) if named else small_model(default_folder())
    number_type, use_cpu = _number_type(in_file | on_line)
    on_cpu = use_cpu or not torch.cuda.is_available()
    script_args, training, model, _, own = _parsed(parser, words if is_given else words + EVERYTHING, on_cpu)
    model.model_name_or_path = in_file.get("model_name_or_path")  # that of the line is what the step is made on
    adapter = starting_adapter(script_args, model)
    model.model_name_or_path = model.model_name_or_path or step_model
    turns = script_args.tools, script_args.environment
    return Recipe(
        step_model, training, model, adapter, *turns, number_type if is_given else None, use_cpu, own.card_gib
    )


def _parsed(parser: OptionsParser, words: list[str], on_cpu: bool) -> tuple[Any, ...]:
    """The dataclasses of options, without a number type: one that does not work here is a finding, and no error."""
    readable = [*words, "--bf16", "false", "--fp16", "false"]
    without_card = [*readable, "--use_cpu", "true"]
    try:
        return parser.parse_args_and_config(without_card if on_cpu else readable)
    except RuntimeError:  # of a card that no process can use: rows and checks say so, and the recipe is read without
        return parser.parse_args_and_config(without_card)


def _number_type(given: dict[str, object]) -> tuple[NumberType, bool]:
    """What the training would compute in, and whether on the processor, by its settings as they were written."""
    bf16, fp16, use_cpu = (
        {"true": True, "false": False}.get(str(given.get(name)).lower()) for name in ("bf16", "fp16", "use_cpu")
    )
    if fp16 and bf16:
        raise ValueError("`fp16` and `bf16` are both true. Set one of them to false: a training computes in one type.")
    if fp16:
        return "float16", bool(use_cpu)
    return ("bfloat16" if bf16 is not False else "float32"), bool(use_cpu)  # TRL's default is bfloat16
