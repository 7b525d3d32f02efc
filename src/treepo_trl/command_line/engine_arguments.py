"""Options of the commands that sample without a trainer: the model, and the engine around it."""

from dataclasses import dataclass, field
from typing import Literal

from trl import GRPOConfig, ModelConfig

from treepo_trl.settings import Exclusion, Ranges, check_exclusions, check_fields, of_this_process

from .arguments import help_of


EngineName = Literal["auto", "vllm", "transformers"]
VLLMMode = Literal["colocate", "server"]
WeightType = Literal["auto", "bfloat16", "float16", "float32"]

_RANGES: Ranges = {
    "vllm_server_timeout": (lambda value: value > 0, "above 0"),
    "vllm_gpu_memory_utilization": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "vllm_max_model_length": (lambda value: value >= 1, "at least 1 token"),
    "vllm_tensor_parallel_size": (lambda value: value >= 1, "at least 1"),
    "vllm_max_num_seqs": (lambda value: value >= 1, "at least 1"),
}


@dataclass
class EngineArguments:
    """The model and the engine that samples from it."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model of the hub, or folder."})
    model_revision: str = field(default="main", metadata=help_of(ModelConfig, "model_revision"))
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "LoRA adapter to sample with, of the hub or a folder."}
    )
    engine: EngineName = field(
        default="auto", metadata={"help": "Engine; auto is vLLM where it is installed, else transformers."}
    )
    dtype: WeightType = field(default="auto", metadata={"help": "Type of the weights; auto is the checkpoint's."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention that transformers loads the model with. The engine decodes with one of its own."},
    )
    trust_remote_code: bool = field(default=False, metadata=help_of(GRPOConfig, "trust_remote_code"))
    vllm_gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "Fraction of the memory that vLLM may use. Default: 0.9, on a CPU 0.3."}
    )
    vllm_max_model_length: int | None = field(default=None, metadata=help_of(GRPOConfig, "vllm_max_model_length"))
    vllm_tensor_parallel_size: int = field(default=1, metadata=help_of(GRPOConfig, "vllm_tensor_parallel_size"))
    vllm_max_num_seqs: int | None = field(
        default=None, metadata={"help": "Sequences that vLLM runs at once. Default: vLLM's."}
    )
    vllm_quantization: str | None = field(
        default=None, metadata={"help": "vLLM's quantization method, such as bitsandbytes. Default: the checkpoint's."}
    )
    vllm_enforce_eager: bool = field(default=False, metadata={"help": "Whether vLLM leaves CUDA graphs out."})
    vllm_mode: VLLMMode = field(
        default="colocate", metadata={"help": "Where vLLM runs: in this process (colocate), or on servers."}
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={"help": "Address of the server, or several parted by commas, for `vllm_mode='server'`."},
    )
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the servers, and for an answer of one."}
    )

    def __post_init__(self) -> None:
        check_fields(self, EngineArguments, _RANGES)
        check_exclusions(self, EXCLUSIONS)


_SERVERS = {"vllm_mode": "server"}
_GO_TOGETHER = (
    "`vllm_mode='server'` and `vllm_server_base_url` go together: give both, such as `--vllm_mode server "
    "--vllm_server_base_url http://localhost:8000`, or neither."
)
_OF_THIS_PROCESS = (
    *("dtype", "attn_implementation", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_enforce_eager"),
    *("vllm_tensor_parallel_size", "vllm_max_num_seqs", "vllm_quantization"),
)
EXCLUSIONS = (
    Exclusion({**_SERVERS, "vllm_server_base_url": None}, _GO_TOGETHER),
    Exclusion({"vllm_mode": "colocate"}, _GO_TOGETHER, needs={"vllm_server_base_url": None}),
    *of_this_process(
        _SERVERS, {name: EngineArguments.__dataclass_fields__[name].default for name in _OF_THIS_PROCESS}
    ),
    Exclusion(
        {**_SERVERS, "engine": "transformers"},
        "`engine='transformers'` runs no vLLM, but `vllm_mode` is 'server'. Leave one of them out.",
    ),
)
