"""
The Modelfile by which Ollama imports an exported model.

Ollama knows the chat templates of many models by their text, and recognises them at import. A `TEMPLATE` here turns
that off, so there is one only where it is sure: for ChatML, if the tokenizer's own template gives the same text for
several conversations.
"""

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase


Message = dict[str, str]

_CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
_SYSTEM: Message = {"role": "system", "content": "Answer in one word."}
_ASKED: list[Message] = [{"role": "user", "content": "What is 3 + 4?"}]
_ASKED_AGAIN: list[Message] = [
    *_ASKED,
    {"role": "assistant", "content": "It is 7."},
    {"role": "user", "content": "And twice that?"},
]


def chatml(messages: list[Message]) -> str:
    """What the template of the Modelfile makes of a conversation."""
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join([*turns, "<|im_start|>assistant\n"])


def chatml_system(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """
    The system message that a ChatML template adds where there is none, `""` for none.

    Returns:
        `str`, *optional*: `None` if the tokenizer's template is not ChatML.
    """
    if not tokenizer.chat_template:
        return None
    try:
        asked = _rendered(tokenizer, _ASKED)
        start, end = "<|im_start|>system\n", "<|im_end|>\n"
        system = asked.removeprefix(start).partition(end)[0] if asked.startswith(start) else ""
        added: list[Message] = [{"role": "system", "content": system}] if system else []
        same = [_rendered(tokenizer, messages) == chatml([*added, *messages]) for messages in (_ASKED, _ASKED_AGAIN)]
        given = [[_SYSTEM, *messages] for messages in (_ASKED, _ASKED_AGAIN)]
        same += [_rendered(tokenizer, messages) == chatml(messages) for messages in given]
    except TemplateError:  # it refuses one of these conversations
        return None
    return system if all(same) else None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def modelfile(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig) -> str:
    """The text of the Modelfile: base, template if it is sure, where a completion ends, and how tokens are drawn."""
    lines = ["# ollama create NAME -f Modelfile", "FROM ."]
    system = chatml_system(tokenizer)
    if system is None:
        lines.append("# No TEMPLATE: Ollama looks for one by the tokenizer's. Compare `ollama show --template NAME`.")
    else:
        lines += [f'TEMPLATE """{_CHATML}"""', *([f'SYSTEM """{system}"""'] if system else [])]
    ends = generation_config.eos_token_id
    for token_id in ends if isinstance(ends, list) else [ends]:
        token = str(tokenizer.decode([token_id]))
        if token and '"' not in token:  # Ollama has no way to write one in a quoted text
            lines.append(f'PARAMETER stop "{token}"')
    temperature = generation_config.temperature
    lines.append(f"PARAMETER temperature {1.0 if temperature is None else temperature}")
    for name in ("top_p", "top_k"):
        value = getattr(generation_config, name)
        if value is not None:
            lines.append(f"PARAMETER {name} {value}")
    return "\n".join([*lines, ""])
