"""Names and shapes of our weights and of Hugging Face's, in one table that is read in both directions.

Ours are the global tensors of `models/shards.py`: whole, whatever the layout; neither side pads the vocabulary. Plain
dictionaries of tensors on both sides; the transformers library is not needed.

`h` hidden, `f` feed-forward, `q` heads * head size, `k` query groups * head size, `c` = q + 2k, `v` vocabulary, `s` positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from largeformer.config.schema import ModelConfig
from largeformer.errors import BadInputError
from largeformer.models.hf_config import Style, architecture

Weights = Mapping[str, torch.Tensor]
BESIDE = "distillation."  # so begin our names of what is trained along with a model, is kept in its checkpoints, and is no part of it


@dataclass(frozen=True)
class Form:
    """How one tensor of ours is cut into theirs, and put together again. Each takes the model's shape as well.

    Of a matrix, `cut` may be given a part along `axis`, in whole `unit`s: what it returns are the rows of theirs that follow the
    rows of the part before.
    """

    cut: Callable[[torch.Tensor, ModelConfig], tuple[torch.Tensor, ...]]
    join: Callable[[tuple[torch.Tensor, ...], ModelConfig], torch.Tensor]
    axis: int = 0
    unit: Callable[[ModelConfig], int] = lambda _: 1

    def cut_in_parts(self, tensor: torch.Tensor, model: ModelConfig, elements: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """`cut` of one part after another, each of about `elements` elements, so that no second copy of the whole is made."""
        if tensor.dim() == 1:
            yield self.cut(tensor, model)
            return
        unit = self.unit(model)
        step = max(1, elements * tensor.shape[self.axis] // max(1, tensor.numel()) // unit) * unit
        for part in tensor.split(step, dim=self.axis):
            yield self.cut(part, model)


@dataclass(frozen=True)
class Row:
    """`ours` is made of the tensors `theirs` (name -> shape, in the letters above), where the model has the features `needs`."""

    ours: str
    theirs: Mapping[str, str]
    form: Form
    needs: str = ""


def _rows_of_a_group(model: ModelConfig) -> int:
    """Rows of one query group in the matrix that makes queries, keys and values."""
    return (model.num_attention_heads // model.query_groups + 2) * model.head_dim


def _cut_heads(tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """[c, ...], where each query group has its queries, then its key, then its value -> [q, ...], [k, ...], [k, ...]."""
    queries = model.num_attention_heads // model.query_groups
    grouped = tensor.unflatten(0, (-1, queries + 2, model.head_dim))
    return tuple(part.flatten(0, 2) for part in grouped.split([queries, 1, 1], dim=1))


def _join_heads(parts: tuple[torch.Tensor, ...], model: ModelConfig) -> torch.Tensor:
    return torch.cat([part.unflatten(0, (model.query_groups, -1, model.head_dim)) for part in parts], dim=1).flatten(0, 2)


def _cut_conv_heads(tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    return (torch.cat(_cut_heads(tensor, model)).t(),)


def _join_conv_heads(parts: tuple[torch.Tensor, ...], model: ModelConfig) -> torch.Tensor:
    return _join_heads(parts[0].t().split([_sizes(model)[letter] for letter in "qkk"]), model)


# GPT-2's layers are Conv1D: y = x W + b, so that its matrices are the transposes of a Linear's. (`t` leaves a bias as it is.)
SAME = Form(cut=lambda tensor, _: (tensor,), join=lambda parts, _: parts[0])
TRANSPOSED = Form(cut=lambda tensor, _: (tensor.t(),), join=lambda parts, _: parts[0].t(), axis=1)
HEADS = Form(cut=_cut_heads, join=_join_heads, unit=_rows_of_a_group)
CONV_HEADS = Form(cut=_cut_conv_heads, join=_join_conv_heads, axis=1)


def _features(model: ModelConfig) -> set[str]:
    """What decides whether a row of the tables stands in this model: the words of `Row.needs`."""
    return {
        name
        for name, there in {
            "learned": model.position_embedding == "learned",
            "untied": not model.tie_embeddings,
            "centred": model.normalization == "LayerNorm",
            "gated": model.activation == "swiglu",
            "ungated": model.activation != "swiglu",
            "bias": model.add_bias_linear,
            "qkv_bias": model.add_bias_linear or model.add_qkv_bias,
        }.items()
        if there
    }


# A leading "*" stands for the layer: "decoder.layers.N." with us. The Llama table goes further than Llama (biases, learned
# positions, GELU): these are the names of `models/plain.py`, which has every shape.
LLAMA = (
    Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "v h"}, SAME),
    Row("embedding.position_embeddings.weight", {"model.embed_positions.weight": "s h"}, SAME, "learned"),
    Row("*input_layernorm.weight", {"*input_layernorm.weight": "h"}, SAME),
    Row("*input_layernorm.bias", {"*input_layernorm.bias": "h"}, SAME, "centred"),
    Row(
        "*self_attention.linear_qkv.weight",
        {"*self_attn.q_proj.weight": "q h", "*self_attn.k_proj.weight": "k h", "*self_attn.v_proj.weight": "k h"},
        HEADS,
    ),
    Row(
        "*self_attention.linear_qkv.bias",
        {"*self_attn.q_proj.bias": "q", "*self_attn.k_proj.bias": "k", "*self_attn.v_proj.bias": "k"},
        HEADS,
        "qkv_bias",
    ),
    Row("*self_attention.linear_proj.weight", {"*self_attn.o_proj.weight": "h q"}, SAME),
    Row("*self_attention.linear_proj.bias", {"*self_attn.o_proj.bias": "h"}, SAME, "bias"),
    Row("*pre_mlp_layernorm.weight", {"*post_attention_layernorm.weight": "h"}, SAME),
    Row("*pre_mlp_layernorm.bias", {"*post_attention_layernorm.bias": "h"}, SAME, "centred"),
    Row("*mlp.linear_fc1.weight_w", {"*mlp.gate_proj.weight": "f h"}, SAME, "gated"),
    Row("*mlp.linear_fc1.bias_w", {"*mlp.gate_proj.bias": "f"}, SAME, "gated bias"),
    Row("*mlp.linear_fc1.weight_v", {"*mlp.up_proj.weight": "f h"}, SAME, "gated"),
    Row("*mlp.linear_fc1.bias_v", {"*mlp.up_proj.bias": "f"}, SAME, "gated bias"),
    Row("*mlp.linear_fc1.weight", {"*mlp.up_proj.weight": "f h"}, SAME, "ungated"),
    Row("*mlp.linear_fc1.bias", {"*mlp.up_proj.bias": "f"}, SAME, "ungated bias"),
    Row("*mlp.linear_fc2.weight", {"*mlp.down_proj.weight": "h f"}, SAME),
    Row("*mlp.linear_fc2.bias", {"*mlp.down_proj.bias": "h"}, SAME, "bias"),
    Row("decoder.final_layernorm.weight", {"model.norm.weight": "h"}, SAME),
    Row("decoder.final_layernorm.bias", {"model.norm.bias": "h"}, SAME, "centred"),
    Row("output_layer.weight", {"lm_head.weight": "v h"}, SAME, "untied"),
)
GPT2 = (
    Row("embedding.word_embeddings.weight", {"transformer.wte.weight": "v h"}, SAME),
    Row("embedding.position_embeddings.weight", {"transformer.wpe.weight": "s h"}, SAME),
    Row("*input_layernorm.weight", {"*ln_1.weight": "h"}, SAME),
    Row("*input_layernorm.bias", {"*ln_1.bias": "h"}, SAME),
    Row("*self_attention.linear_qkv.weight", {"*attn.c_attn.weight": "h c"}, CONV_HEADS),
    Row("*self_attention.linear_qkv.bias", {"*attn.c_attn.bias": "c"}, CONV_HEADS),
    Row("*self_attention.linear_proj.weight", {"*attn.c_proj.weight": "q h"}, TRANSPOSED),
    Row("*self_attention.linear_proj.bias", {"*attn.c_proj.bias": "h"}, SAME),
    Row("*pre_mlp_layernorm.weight", {"*ln_2.weight": "h"}, SAME),
    Row("*pre_mlp_layernorm.bias", {"*ln_2.bias": "h"}, SAME),
    Row("*mlp.linear_fc1.weight", {"*mlp.c_fc.weight": "h f"}, TRANSPOSED),
    Row("*mlp.linear_fc1.bias", {"*mlp.c_fc.bias": "f"}, SAME),
    Row("*mlp.linear_fc2.weight", {"*mlp.c_proj.weight": "f h"}, TRANSPOSED),
    Row("*mlp.linear_fc2.bias", {"*mlp.c_proj.bias": "h"}, SAME),
    Row("decoder.final_layernorm.weight", {"transformer.ln_f.weight": "h"}, SAME),
    Row("decoder.final_layernorm.bias", {"transformer.ln_f.bias": "h"}, SAME),
    Row("output_layer.weight", {"lm_head.weight": "v h"}, SAME, "untied"),
)
TABLES: dict[Style, tuple[Row, ...]] = {"llama": LLAMA, "gpt2": GPT2}
THEIR_LAYER: dict[Style, str] = {"llama": "model.layers.{}.", "gpt2": "transformer.h.{}."}
# What files of theirs may hold beside weights: causal masks, rotary tables.
_NOT_WEIGHTS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def to_hugging_face(state: Weights, model: ModelConfig, style: Style | None = None) -> dict[str, torch.Tensor]:
    """Our global tensors under their names. Tied embeddings stand once, as in their files.

    `style` None: as `architecture` picks it, with its `zeros`. The tensors may share memory with `state`.
    """
    made = {} if style else {name: torch.zeros(size) for name, size in zeros(model).items()}
    for row in rows(model, style or architecture(model).style):
        made.update(zip(row.theirs, row.form.cut(state[row.ours], model), strict=True))
    return made


def from_hugging_face(state: Weights, model: ModelConfig, vocab_size: int, style: Style | None = None) -> dict[str, torch.Tensor]:
    """Their tensors under our names. Raises BadInputError with every tensor that is missing, misshapen or unknown to this shape."""
    table = rows(model, style or architecture(model).style)
    state = _without_zeros(state, {} if style else zeros(model))
    if "wte.weight" in state:  # some GPT-2 files leave out the outermost module's name
        state = {f"transformer.{name}": tensor for name, tensor in state.items()}
    _check(state, table, model, vocab_size)
    return {row.ours: row.form.join(tuple(state[name] for name in row.theirs), model).contiguous() for row in table}


def rows(model: ModelConfig, style: Style) -> list[Row]:
    """The table for this model, its layers written out."""
    made = []
    for row in (row for row in TABLES[style] if set(row.needs.split()) <= _features(model)):
        if not row.ours.startswith("*"):
            made.append(row)
            continue
        for layer in range(model.num_layers):
            theirs = {name.replace("*", THEIR_LAYER[style].format(layer)): shape for name, shape in row.theirs.items()}
            made.append(Row(row.ours.replace("*", f"decoder.layers.{layer}."), theirs, row.form, row.needs))
    return made


def zeros(model: ModelConfig) -> dict[str, int]:
    """The vectors that their class has and our model has not, and their lengths: where queries, keys and values alone have biases, the
    output's."""
    if model.normalization == "LayerNorm" or model.add_bias_linear or not model.add_qkv_bias:
        return {}
    return {f"{THEIR_LAYER['llama'].format(layer)}self_attn.o_proj.bias": model.hidden_size for layer in range(model.num_layers)}


def _without_zeros(state: Weights, names: Iterable[str]) -> Weights:
    """`state` without what these `zeros` name; a Qwen2 has none of them. Raises BadInputError where one is not zero."""
    held = [name for name in names if name in state]
    if moved := [name for name in held if state[name].any()]:
        raise BadInputError(
            [
                f"{name} is not zero, and config.json says mlp_bias False: our attention has biases on queries, keys and values alone, or "
                "every linear layer has one"
                for name in moved
            ]
        )
    return {name: tensor for name, tensor in state.items() if name not in held}


def _sizes(model: ModelConfig) -> dict[str, int]:
    q, k = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    return {"h": model.hidden_size, "f": model.ffn_size, "q": q, "k": k, "c": q + 2 * k, "s": model.seq_length}


def shapes(table: list[Row], model: ModelConfig, vocab_size: int) -> dict[str, list[int]]:
    """The shape of every tensor of theirs."""
    sizes = _sizes(model) | {"v": vocab_size}
    return {name: [sizes[letter] for letter in shape.split()] for row in table for name, shape in row.theirs.items()}


def _check(state: Weights, table: list[Row], model: ModelConfig, vocab_size: int) -> None:
    expected = shapes(table, model, vocab_size)
    wrong = [
        f"{name} is missing" if name not in state else f"{name} has the shape {list(state[name].shape)}; this model's is {shape}"
        for name, shape in expected.items()
        if name not in state or list(state[name].shape) != shape
    ]
    tied_copy = {"lm_head.weight"} if model.tie_embeddings else set()
    unknown = [name for name in state if name not in expected and name not in tied_copy and not name.endswith(_NOT_WEIGHTS)]
    if wrong or unknown:
        raise BadInputError([*wrong, *(f"{name} has no place in this model; its shape in the recipe is another" for name in unknown)])
