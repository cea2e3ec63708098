"""Every parameter that a rank holds, by size: what DeepSpeed's padding and partitioning work on.

`h` hidden, `q` heads x head size, `k` query groups x head size, `f` feed-forward, `v` padded vocabulary, `s` sequence, `t` tensor parallel.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from largeformer.config.schema import ModelConfig, Recipe
from largeformer.layout import stage_layers


@dataclass(frozen=True)
class Inventory:
    """One pipeline stage's share of a tensor-parallel rank, before ZeRO.

    matrices, vectors: elements of a parameter -> how many there are; apart, since the optimizer decays only the first, and
    DeepSpeed flattens each of its parameter groups on its own. chunks: layers of each virtual stage.
    """

    stage: int
    matrices: Counter[int]
    vectors: Counter[int]
    chunks: tuple[int, ...]
    has_embedding: bool
    has_head: bool

    @property
    def groups(self) -> list[Counter[int]]:
        return [group for group in (self.matrices, self.vectors) if group]

    @property
    def elements(self) -> int:
        return sum(size * count for group in self.groups for size, count in group.items())

    @property
    def largest(self) -> int:
        return max(size for group in self.groups for size in group)


def inventories(recipe: Recipe) -> list[Inventory]:
    """One for each pipeline stage."""
    model, parallel, t = recipe.model, recipe.parallel, recipe.parallel.tensor_model_parallel_size
    stages = stage_layers(
        model.num_layers,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
        parallel.num_layers_in_first_pipeline_stage,
        parallel.num_layers_in_last_pipeline_stage,
    )
    layer_matrices, layer_vectors = _layer(model, t)
    rows = recipe.padded_vocab_size // t
    found = []
    for number, chunks in enumerate(stages):
        first, last = number == 0, number == len(stages) - 1
        layers = sum(len(chunk) for chunk in chunks)
        matrices = Counter({size: count * layers for size, count in layer_matrices.items()})
        vectors = Counter({size: count * layers for size, count in layer_vectors.items()})
        if first:
            matrices[rows * model.hidden_size] += 1
            if model.position_embedding == "learned":
                matrices[model.seq_length * model.hidden_size] += 1
        if last:
            vectors[model.hidden_size] += _per_norm(model)
            if not (first and model.tie_embeddings):  # a tied embedding stands on both ends of a pipeline
                matrices[rows * model.hidden_size] += 1
        found.append(Inventory(number, matrices, vectors, tuple(len(chunk) for chunk in chunks), first, last))
    return found


def _layer(model: ModelConfig, t: int) -> tuple[Counter[int], Counter[int]]:
    """Matrices and vectors of one layer. Biases of row-parallel matrices and norms stand whole on every rank."""
    h, f = model.hidden_size, model.ffn_size * (2 if model.activation == "swiglu" else 1)
    q, k = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    matrices = Counter({(q + 2 * k) * h // t: 1})
    for size in (q * h // t, f * h // t, model.ffn_size * h // t):
        matrices[size] += 1
    vectors = Counter({h: 2 * _per_norm(model)})
    if model.add_bias_linear or model.add_qkv_bias:
        vectors[(q + 2 * k) // t] += 1
    if model.add_bias_linear:
        vectors[f // t] += 1
        vectors[h] += 2
    return matrices, vectors


def _per_norm(model: ModelConfig) -> int:
    return 2 if model.normalization == "LayerNorm" else 1
