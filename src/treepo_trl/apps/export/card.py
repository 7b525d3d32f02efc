"""The model card of an exported model."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .exported import Export
from .source import AdapterSource


def model_card(source: AdapterSource, export: Export) -> ModelCard:
    """What the model is, how it was made and checked, and how to run it."""
    is_local = Path(source.base).exists()  # a path means nothing elsewhere
    data = ModelCardData(
        base_model=None if is_local else source.base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(source.folder),
    )
    dtype = str(export.dtype).removeprefix("torch.")
    base = Path(source.base).name if is_local else source.base
    kind = getattr(source.peft_config.peft_type, "value", source.peft_config.peft_type)
    in_4bit = "\nThe base was in 4 bits in training, and is merged as the numbers that its weights stand for.\n"
    text = f"""\
---
{data.to_yaml()}
---

# {export.folder.name}

A {kind} adapter merged into `{base}` by `treepo-trl export`, in {dtype}.
{in_4bit if export.was_4bit else ""}
On a few texts the log-probabilities of this model are {export.difference.mean:.2g} nats per token from those of the
base with its adapter. The adapter itself moves them by {export.difference.of_adapter:.2g}.

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{export.folder.name}")
print(generator([{{"role": "user", "content": "What is 17 + 25?"}}], max_new_tokens=256)[0]["generated_text"][-1])
```

```sh
vllm serve {export.folder.name}
ollama create {export.folder.name.lower()} -f Modelfile
```
"""
    return ModelCard(text)


def _tags(folder: Path) -> list[str] | None:
    """What the adapter's own card says of its training."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    tags = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("tags")
    kept = [tag for tag in tags or [] if tag in ("trl", "treepo", "grpo", "sft", "dpo")]
    return kept or None
