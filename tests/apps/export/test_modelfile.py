"""The Modelfile: a template only where it is sure to be the tokenizer's own."""

from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests.support.models import make_tokenizer
from treepo_trl.apps.export.modelfile import chatml, chatml_system, modelfile


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + CHATML
)


def tokenizer(template: str | None) -> Any:
    made = make_tokenizer()
    made.chat_template = template
    return made


def test_chatml_by_hand() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chatml(messages) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "system"),
    [
        (CHATML, ""),
        (WITH_SYSTEM, "Be kind."),
        (None, None),
        (CHATML.replace("<|im_end|>", "</s>"), None),
        ("{{ bos_token }}" + CHATML.replace("assistant\\n", "assistant"), None),
        # What it was trained with is seen in a later turn alone, or is an error for some conversations.
        (CHATML.replace("m['content']", "(m['content'] if loop.first else m['content'] | upper)"), None),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML, None),
    ],
    ids=["chatml", "with a system", "none", "other end", "other start", "other later turns", "refuses systems"],
)
def test_what_is_chatml(template: str | None, system: str | None) -> None:
    assert chatml_system(tokenizer(template)) == system


def test_the_modelfile_of_a_known_template() -> None:
    config = GenerationConfig(eos_token_id=[0, 1], do_sample=True, temperature=0.6, top_p=0.95)
    assert modelfile(tokenizer(WITH_SYSTEM), config) == (
        "# ollama create NAME -f Modelfile\n"
        "FROM .\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """Be kind."""\n'
        'PARAMETER stop "<eos>"\n'
        'PARAMETER stop "<pad>"\n'
        "PARAMETER temperature 0.6\n"
        "PARAMETER top_p 0.95\n"
    )


def test_an_unknown_template_is_left_to_ollama() -> None:
    text = modelfile(tokenizer("{{ messages[0]['content'] }}"), GenerationConfig(eos_token_id=0))
    assert "\nTEMPLATE" not in text
    assert "\nSYSTEM" not in text
    assert text.endswith('PARAMETER stop "<eos>"\nPARAMETER temperature 1.0\n')


def test_the_small_model_is_known(small_model_dir: str) -> None:
    system = chatml_system(AutoTokenizer.from_pretrained(small_model_dir))
    assert system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
