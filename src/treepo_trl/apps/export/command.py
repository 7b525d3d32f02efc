"""`treepo-trl export`: an adapter merged into its base, as a model for transformers, vLLM and Ollama."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from treepo_trl.apps.export import AdapterSource, Export, export_model, find_adapter
from treepo_trl.command_line.arguments import OptionsParser, help_of, options_parser
from treepo_trl.command_line.engine_arguments import EngineArguments, WeightType
from treepo_trl.command_line.errors import user_errors
from treepo_trl.policy.four_bit_base import BaseQuantization
from treepo_trl.preflight import require_model
from treepo_trl.settings import check_fields, check_text

from .folder import check_is_new


@dataclass
class ExportArguments:
    """What `treepo-trl export` takes beside the name of a run, a checkpoint or an adapter."""

    out: str | None = field(default=None, metadata={"help": "Folder to write; it must not exist."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base. Default: the one that the adapter names."}
    )
    model_revision: str = field(default="main", metadata=help_of(EngineArguments, "model_revision"))
    dtype: WeightType = field(
        default="auto",
        metadata={
            "help": "Precision of the weights that are written. auto is that of the base's files, with a 4-bit base "
            "that of the training."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Whether the base was in 4 bits in training. Adapters that `treepo-trl train` has written say so "
            "themselves."
        },
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(
        default="nf4", metadata={"help": "With `load_in_4bit`: the kind of 4 bits in training."}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "With `load_in_4bit`: whether the scales were quantized too."}
    )
    trust_remote_code: bool = field(default=False, metadata=help_of(EngineArguments, "trust_remote_code"))

    def __post_init__(self) -> None:
        check_fields(self, ExportArguments, {})
        for name in ("out", "model_name_or_path"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))


def command_parser() -> OptionsParser:
    """The options of `treepo-trl export`, and the name of the run, checkpoint or adapter."""
    parser = options_parser("export", ExportArguments)
    parser.usage = "treepo-trl export RUN --out FOLDER [--config FILE] [options]"
    run_help = "`output_dir` of a run, one of its checkpoints, or a folder with an adapter."
    parser.add_argument("run", nargs="?", metavar="RUN", help=run_help)
    return parser


def main(argv: list[str]) -> None:
    """Run the command with the arguments after `treepo-trl export`."""
    with user_errors():
        arguments, name = _parsed(argv)
        out = Path(str(arguments.out))
        check_is_new(out)
        source = find_adapter(name, arguments.model_name_or_path)
        require_model(source.base)
        quantization = _quantization(arguments)
        print(_announcement(source, quantization or source.quantization), flush=True)
        export = export_model(
            source, out, arguments.dtype, quantization, arguments.model_revision, arguments.trust_remote_code
        )
    print(_report(export))


def _parsed(argv: list[str]) -> tuple[ExportArguments, str]:
    """Options, and the name of the run, checkpoint or adapter."""
    arguments, rest = command_parser().parse_args_and_config(argv)
    if not rest.run:
        raise ValueError("Name what to export: a run's `output_dir`, a checkpoint, or a folder with an adapter.")
    check_text("run", rest.run)
    if arguments.out is None:
        raise ValueError("Say where the model is to be written: `--out FOLDER`, which must not exist.")
    return arguments, rest.run


def _quantization(arguments: ExportArguments) -> BaseQuantization | None:
    if not arguments.load_in_4bit:
        return None
    return BaseQuantization(arguments.bnb_4bit_quant_type, arguments.use_bnb_nested_quant, arguments.dtype)


def _announcement(source: AdapterSource, quantization: BaseQuantization | None) -> str:
    lines = [f"adapter    {source.folder}", f"base       {source.base}", f"tokenizer  {source.tokenizer}"]
    if quantization is not None:
        lines.append(
            f"The base was in 4 bits ({quantization.quant_type}) in training. It is written out first, as the numbers "
            "that these weights stand for: that is the base that the adapter was trained on."
        )
    return "\n".join(lines)


def _report(export: Export) -> str:
    difference = export.difference
    lines = [
        f"{export.folder}: {str(export.dtype).removeprefix('torch.')}. Log-probabilities on a few texts are "
        f"{difference.mean:.2g} nats per token from the adapter's on average, {difference.largest:.2g} at most. The "
        f"adapter moves them by {difference.of_adapter:.2g}."
    ]
    if difference.is_lost_to_rounding:
        lines.append(
            "Rounding is not small beside that: the export loses part of what was trained. `--dtype float32` keeps it."
        )
    lines.append(f"vllm serve {export.folder}    ollama create NAME -f {export.folder / 'Modelfile'}")
    return "\n".join(lines)
