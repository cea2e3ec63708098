"""Bytes that the forward pass keeps for the backward, by layer and for the head.

Korthikanti et al. 2022 (arXiv:2205.05198, section 4) counted for the layers that are trained here: fused attention keeps no scores;
queries and keys are copied by the rotary embedding; a gated feed-forward keeps both halves, their product and SiLU's output. `fused`:
whether PyTorch has RMSNorm and dropout as one kernel each, and attention with dropout, as on GPUs; on a CPU it composes them of
several, each of which keeps something.

`n` tokens of a micro batch, `h` hidden, `q` heads x head size, `k` query groups x head size, `f` feed-forward, `t` tensor parallel;
`n / t` where sequence parallelism divides the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from largeformer.config.schema import Recipe

FULL = 4  # bytes of a float32
_MASK = 1  # bytes of a dropout mask's element; composed, it has the type of what is dropped


@dataclass(frozen=True)
class LayerBytes:
    """One layer and one micro batch on a rank. kept: until its backward. working: beside that while it is recomputed. entry: the
    layer's input alone, all that full recomputation keeps."""

    kept: int
    working: int
    entry: int


@dataclass(frozen=True)
class _Widths:
    """Elements of the pieces of a layer, and bytes of an element."""

    element: int
    tokens: int
    norm_tokens: int
    sequence: int
    hidden: int
    query: int
    key: int
    ffn: int
    heads: int
    head: int
    fused: bool

    @classmethod
    def of(cls, recipe: Recipe, fused: bool) -> _Widths:
        model, parallel, t = recipe.model, recipe.parallel, recipe.parallel.tensor_model_parallel_size
        tokens = recipe.train.micro_batch_size * model.seq_length
        return cls(
            element=FULL if recipe.train.precision == "fp32" else 2,
            tokens=tokens,
            norm_tokens=tokens // t if parallel.sequence_parallel else tokens,
            sequence=model.seq_length,
            hidden=model.hidden_size,
            query=model.num_attention_heads * model.head_dim // t,
            key=model.query_groups * model.head_dim // t,
            ffn=model.ffn_size // t,
            heads=model.num_attention_heads // t,
            head=model.head_dim,
            fused=fused,
        )


def layer_bytes(recipe: Recipe, fused: bool = True) -> LayerBytes:
    """What a layer keeps under the recipe's recomputation."""
    w, train = _Widths.of(recipe, fused), recipe.train
    entry = w.norm_tokens * w.hidden * w.element
    core, mlp = _core_attention(recipe, w), _mlp(recipe, w)
    whole = _around_attention(recipe, w) + core + mlp + _norms_and_residual(recipe, w)
    if train.recompute_granularity == "full":
        return LayerBytes(entry, whole, entry)
    if train.recompute_granularity == "selective":
        dropped = (core if "core_attn" in train.recompute_modules else 0) + (mlp if "mlp" in train.recompute_modules else 0)
        return LayerBytes(whole - dropped, dropped, entry)
    return LayerBytes(whole, 0, entry)


def chunk_bytes(recipe: Recipe, layers: int, fused: bool = True) -> int:
    """What `layers` layers of a chunk keep of one micro batch."""
    each, train = layer_bytes(recipe, fused), recipe.train
    if train.recompute_granularity != "full":
        return layers * each.kept
    step = train.recompute_num_layers or 1
    if train.recompute_method == "block":  # the first `step` layers of a chunk are recomputed, the others are not
        recomputed = min(step, layers)
        return recomputed * each.entry + (layers - recomputed) * each.working
    return -(-layers // step) * each.entry


def recomputed_at_once(recipe: Recipe, layers: int, fused: bool = True) -> int:
    """What stands besides while a part of the chunk is recomputed and goes backward."""
    each, train = layer_bytes(recipe, fused), recipe.train
    if train.recompute_granularity != "full":
        return each.working
    step = min(train.recompute_num_layers or 1, layers)
    return each.working * (step if train.recompute_method != "block" else 1)


def backward_bytes(recipe: Recipe) -> int:
    """Gradients of a layer's own activations while it goes backward: the feed-forward's, which are the widest, and the residual's."""
    w = _Widths.of(recipe, True)
    return _mlp(recipe, w) + 2 * w.norm_tokens * w.hidden * w.element


def head_bytes(recipe: Recipe, fused: bool = True) -> tuple[int, int]:
    """Kept until the backward of the last stage, and the workspace of a chunk of logits; see `models/losses.py`.

    Both gradients are made in the forward: that of the weight is float32, and is copied to the weight's dtype in the backward.
    """
    w = _Widths.of(recipe, fused)
    rows = recipe.padded_vocab_size // recipe.parallel.tensor_model_parallel_size
    kept = _norm(recipe, w) + w.tokens * w.hidden * w.element + rows * w.hidden * FULL
    chunk = min(recipe.train.loss_chunk_size, w.tokens)
    return kept, chunk * rows * (2 * w.element + 2 * FULL) + rows * w.hidden * w.element


def embedding_bytes(recipe: Recipe, fused: bool = True) -> int:
    """Ids and positions of a micro batch, and the mask of dropout on their embedding."""
    w = _Widths.of(recipe, fused)
    dropped = _mask(recipe.model.hidden_dropout, w) * w.norm_tokens * w.hidden
    return 2 * 8 * w.tokens + dropped


def boundary_bytes(recipe: Recipe) -> int:
    """A hidden state on its way between pipeline stages: s x b x h, a part of it under sequence parallelism."""
    w = _Widths.of(recipe, True)
    return w.norm_tokens * w.hidden * w.element


def _norms_and_residual(recipe: Recipe, w: _Widths) -> int:
    """Both norms with their outputs, and the masks of two dropouts."""
    masks = 2 * _mask(recipe.model.hidden_dropout, w) * w.norm_tokens * w.hidden
    return 2 * (_norm(recipe, w) + w.norm_tokens * w.hidden * w.element) + masks


def _norm(recipe: Recipe, w: _Widths) -> int:
    """Its input and statistics; composed, RMSNorm keeps its input and the normalised product, both in float32."""
    layer_norm = recipe.model.normalization == "LayerNorm"
    width = w.element if w.fused or layer_norm else 2 * FULL
    return w.norm_tokens * (w.hidden * width + FULL * (2 if layer_norm else 1))


def _around_attention(recipe: Recipe, w: _Widths) -> int:
    """The fused projection, of which values are a view, and the attention's output, which is what the next projection multiplies. The
    rotary embedding makes new queries and keys, and keeps its cosines and sines for each of the two."""
    kept = w.tokens * w.element * (w.query + 2 * w.key + w.query)
    if recipe.model.position_embedding == "rope":
        kept += w.tokens * w.element * (w.query + w.key) + 4 * w.sequence * w.head * w.element
    return kept


def _core_attention(recipe: Recipe, w: _Widths) -> int:
    """What recomputing the attention does without: scores, or their logarithmic sums. Its inputs stay."""
    scores, dropout = w.tokens * w.sequence * w.heads, recipe.model.attention_dropout
    if recipe.model.attention_backend == "local":
        # The softmax is float32; what multiplies the values is a copy, in the model's type or after dropout.
        copied = w.element if w.element < FULL or dropout > 0 else 0
        return scores * (FULL + copied + _mask(dropout, w))
    if dropout > 0 and not w.fused:
        # PyTorch has no such kernel for CPUs: softmax, noise and product stand in float32, and copies of the inputs.
        return 3 * FULL * (scores + w.tokens * w.query)
    return w.tokens * w.heads * FULL


def _mlp(recipe: Recipe, w: _Widths) -> int:
    """SwiGLU: both halves of the projection, SiLU's output, the shifted linear half, their product. GELU: its input and output."""
    pieces = 5 if recipe.model.activation == "swiglu" else 2
    return w.tokens * w.element * pieces * w.ffn


def _mask(probability: float, w: _Widths) -> int:
    if probability == 0:
        return 0
    return _MASK if w.fused else w.element
