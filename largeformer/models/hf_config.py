"""Which Hugging Face architecture holds a shape of ours, what its `config.json` says of it, and what such a file means to us.

Plain dictionaries: the transformers library is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from largeformer.config.schema import ModelConfig
from largeformer.errors import BadInputError

Style = Literal["llama", "gpt2"]
_LLAMA_HAS: dict[str, tuple[object, ...]] = {"position_embedding": ("rope",), "activation": ("swiglu",)}
_GPT2_HAS: dict[str, tuple[object, ...]] = {
    "position_embedding": ("learned",),
    "activation": ("gelu", "gelu_tanh"),
    "add_bias_linear": (True,),
}


@dataclass(frozen=True)
class Architecture:
    """A Hugging Face class, and its `model_type`, whose names it uses."""

    name: str
    style: Style


def architecture(model: ModelConfig) -> Architecture:
    """The Hugging Face architecture that holds this shape. Raises BadInputError where none does, with what stands in the way.

    With biases on queries, keys and values alone it is a Llama too, whose bias on the output is zero (`hf_mapping.zeros`), and no Qwen2:
    transformers reads the tokenizer in a Qwen2's folder by Qwen2's own rules, whatever the folder says of it.
    """
    is_gpt2 = model.normalization == "LayerNorm"
    family, needed = ("GPT-2", _GPT2_HAS) if is_gpt2 else ("Llama", _LLAMA_HAS)
    wrong = [
        f"model.{key} is {getattr(model, key)}; a Hugging Face {family} (which {model.normalization} asks for) has "
        f"{' or '.join(str(value) for value in values)}"
        for key, values in needed.items()
        if getattr(model, key) not in values
    ]
    if is_gpt2 and (model.query_groups != model.num_attention_heads or model.head_dim * model.num_attention_heads != model.hidden_size):
        wrong.append(
            "a Hugging Face GPT-2 has heads of hidden_size / num_attention_heads, and as many query groups: leave out "
            "model.num_query_groups and model.kv_channels; a model whose heads or width were pruned can be exported to onnx or largeformer"
        )
    if wrong:
        raise BadInputError(wrong)
    if is_gpt2:
        return Architecture("GPT2LMHeadModel", "gpt2")
    return Architecture("LlamaForCausalLM", "llama")


def hugging_face_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What their `config.json` says of this shape."""
    kind = architecture(model)
    common = {
        "architectures": [kind.name],
        "model_type": kind.style,
        "vocab_size": vocab_size,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if kind.style == "gpt2":
        return common | {
            "n_positions": model.seq_length,
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_size,
            "activation_function": {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}[model.activation],
            "layer_norm_epsilon": model.norm_epsilon,
            "resid_pdrop": model.hidden_dropout,
            "embd_pdrop": model.hidden_dropout,
            "attn_pdrop": model.attention_dropout,
        }
    return common | {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_dropout": model.attention_dropout,
        "attention_bias": model.add_bias_linear or model.add_qkv_bias,
        "mlp_bias": model.add_bias_linear,
    }


def model_of(config: Mapping[str, Any]) -> ModelConfig:
    """Our shape for a `config.json` of theirs: the inverse of `hugging_face_config`.

    Raises BadInputError with everything in it that our model does not compute, or cannot be read.
    """
    kind = config.get("model_type")
    if kind not in _READERS:
        raise BadInputError(f"model_type is {kind!r}; what can be imported: {', '.join(sorted(_READERS))}")
    problems = [
        f"{key} is {config[key]!r}, which our {kind} does not compute: {reason}"
        for key, (idle, reason) in _NOT_COMPUTED.items()
        if key in config and config[key] not in idle
    ]
    try:
        shape, more = _READERS[kind](config)
        model = ModelConfig.model_validate(shape)
    except KeyError as error:
        raise BadInputError([*problems, f"config.json says no {error.args[0]}, which a {kind} needs"]) from None
    except (TypeError, ZeroDivisionError) as error:
        raise BadInputError([*problems, f"config.json holds a size that is no number above 0 ({error}): a {kind} cannot have it"]) from None
    except ValidationError as error:
        wrong = [f"config.json: {'.'.join(map(str, found['loc']))} would be {found['input']!r}: {found['msg']}" for found in error.errors()]
        raise BadInputError([*problems, *wrong]) from None
    if problems or more:
        raise BadInputError([*problems, *more])
    return model


# Key -> values that ask for nothing, and why any other is refused.
_NOT_COMPUTED: dict[str, tuple[tuple[object, ...], str]] = {
    "rope_scaling": ((None, {}), "positions are rotated plainly (rope_type default)"),
    "partial_rotary_factor": ((None, 1.0), "the whole head is rotated"),
    "use_sliding_window": ((None, False), "attention reaches back to the beginning"),
    "scale_attn_weights": ((None, True), "scores are divided by the root of the head size"),
    "scale_attn_by_inverse_layer_idx": ((None, False), "every layer scales its scores alike"),
    "add_cross_attention": ((None, False), "it is a decoder alone"),
    "quantization_config": ((None,), "its weights are integers; import the model that they were made from"),
}


def _read_llama(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our keys for a Llama, a Mistral or a Qwen2, and what is wrong with it."""
    qwen = config["model_type"] == "qwen2"
    rope = config.get("rope_parameters") or {}
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    window, positions = config.get("sliding_window"), config["max_position_embeddings"]
    problems = []
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {config['hidden_act']!r}; our gated layers have silu")
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters.rope_type is {rope['rope_type']!r}; ours is default")
    if mlp_bias and not bias:
        problems.append("attention_bias is False and mlp_bias True; ours are both (model.add_bias_linear), or on the attention alone")
    if config["model_type"] == "mistral" and window is not None and window < positions:
        problems.append(f"sliding_window is {window}; our attention reaches back to the beginning")
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": head_dim if head_dim * heads != hidden else None,
        "seq_length": positions,
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "rotary_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "add_bias_linear": mlp_bias,
        "add_qkv_bias": bias or qwen,
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "init_method_std": config.get("initializer_range", 0.02),
    }, problems


def _read_gpt2(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    activation = config.get("activation_function", "gelu_new")
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    hidden_dropout, embedding_dropout = config.get("resid_pdrop", 0.1), config.get("embd_pdrop", 0.1)
    problems = [] if activation in activations else [f"activation_function is {activation!r}; ours are {', '.join(activations)}"]
    if hidden_dropout != embedding_dropout:
        problems.append(f"resid_pdrop is {hidden_dropout} and embd_pdrop {embedding_dropout}; ours is one number, model.hidden_dropout")
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
        "num_attention_heads": config["n_head"],
        "seq_length": config["n_positions"],
        "normalization": "LayerNorm",
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "activation": activations.get(activation, "gelu"),
        "position_embedding": "learned",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "hidden_dropout": hidden_dropout,
        "attention_dropout": config.get("attn_pdrop", 0.1),
        "init_method_std": config.get("initializer_range", 0.02),
    }, problems


_READERS: dict[Any, Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]]] = {
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "gpt2": _read_gpt2,
}
