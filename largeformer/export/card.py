"""The model card: what the model is, where it comes from, and how far the export is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from largeformer.config.schema import ModelConfig

_SHOWN = (
    ("tokens", "held-out tokens compared", "{:,}"),
    ("source_perplexity", "perplexity of the source", "{:.4f}"),
    ("perplexity", "perplexity of the export", "{:.4f}"),
    ("max_logit_difference", "largest logit difference", "{:.3g}"),
    ("mean_logit_difference", "mean logit difference", "{:.3g}"),
    ("kl", "KL divergence, nats", "{:.3g}"),
    ("top1_agreement", "same likeliest token", "{:.2%}"),
)
_OPEN = {
    "hf": '```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nmodel = AutoModelForCausalLM.from_pretrained(".")\n'
    'tokenizer = AutoTokenizer.from_pretrained(".")\n```',
    "onnx": '```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("./model_int8.onnx")\n```',
    "largeformer": "```\nlargeformer import --from . -o runs/imported\n```",
}
_LIBRARIES = {"hf": "transformers"}


@dataclass(frozen=True)
class Ancestor:
    """A stage that the model went through."""

    stage: str
    identity: str
    metrics: Mapping[str, Any]


def model_card(
    name: str, format_name: str, model: ModelConfig, parameters: int, lineage: Sequence[Ancestor], parity: Mapping[str, Mapping[str, Any]]
) -> str:
    """Markdown with the header that model hubs read. lineage: oldest first; parity: file -> figures of the gate."""
    kind = format_name.partition("-")[0]
    head = ["---", f"library_name: {_LIBRARIES.get(kind, kind)}", "pipeline_tag: text-generation", "tags: [largeformer]", "---"]
    heads = f"{model.num_attention_heads} heads in {model.query_groups} query groups"
    shape = f"{model.num_layers} layers, hidden size {model.hidden_size}, {heads}, {model.seq_length} positions"
    lines = [*head, "", f"# {name} ({format_name})", "", f"A causal language model of {parameters:,} parameters: {shape}.", ""]
    lines += ["## Opened with", "", _OPEN[kind], ""]
    lines += ["## Lineage", "", "| stage | identity | figures |", "|---|---|---|"]
    lines += [f"| {step.stage} | `{step.identity}` | {_figures(step.metrics)} |" for step in lineage]
    for file, found in parity.items():
        lines += ["", f"## `{file}` against the model it was made from", "", "| | |", "|---|---|"]
        lines += [f"| {title} | {shown.format(found[key])} |" for key, title, shown in _SHOWN if found.get(key) is not None]
    return "\n".join(lines) + "\n"


def _figures(metrics: Mapping[str, Any]) -> str:
    """The numbers of a manifest, without those of its parts."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}" for name, value in numbers.items()) or "-"
