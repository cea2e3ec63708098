"""How many parameters the recipe's model has, in all and on the fullest rank. Arithmetic on the shape: no torch.

`h` hidden, `a` heads x head size, `g` query groups x head size, `f` feed-forward, `v` vocabulary rows, `s` sequence.
"""

from __future__ import annotations

from largeformer.config.schema import ModelConfig, Recipe
from largeformer.layout import stage_layers


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one Transformer layer."""
    h, f = model.hidden_size, model.ffn_size
    a, g = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    gates = 2 if model.activation == "swiglu" else 1
    weights = h * (a + 2 * g) + a * h + (gates + 1) * h * f
    qkv_bias = a + 2 * g if model.add_qkv_bias or model.add_bias_linear else 0
    biases = h + gates * f + h if model.add_bias_linear else 0
    return weights + qkv_bias + biases + 2 * _norm_parameters(model)


def embedding_parameters(model: ModelConfig, vocab_rows: int) -> int:
    """Parameters before the first layer: the word embedding and, where they are learned, the positions."""
    positions = model.seq_length if model.position_embedding == "learned" else 0
    return (vocab_rows + positions) * model.hidden_size


def model_parameters(model: ModelConfig, vocab_rows: int) -> int:
    """All parameters of the model with `vocab_rows` rows in its embedding; a tied embedding counts once."""
    head = 0 if model.tie_embeddings else vocab_rows * model.hidden_size
    return embedding_parameters(model, vocab_rows) + model.num_layers * layer_parameters(model) + _norm_parameters(model) + head


def rank_parameters(recipe: Recipe) -> int:
    """Parameters on the rank that holds most: its pipeline stage, divided by the tensor-parallel degree.

    An upper estimate by the norms and biases, which tensor parallelism replicates; under 0.1 % of any real model.
    """
    model, parallel, rows = recipe.model, recipe.parallel, recipe.padded_vocab_size
    stages = stage_layers(
        model.num_layers,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
        parallel.num_layers_in_first_pipeline_stage,
        parallel.num_layers_in_last_pipeline_stage,
    )
    held = [sum(len(chunk) for chunk in chunks) * layer_parameters(model) for chunks in stages]
    held[0] += embedding_parameters(model, rows)
    alone = len(stages) == 1
    held[-1] += _norm_parameters(model) + (0 if alone and model.tie_embeddings else rows * model.hidden_size)
    return -(-max(held) // parallel.tensor_model_parallel_size)


def largest_parameter(recipe: Recipe) -> int:
    """Elements of the largest single weight on a rank: an embedding's share, or one of the layer's matrices."""
    model = recipe.model
    qkv = (model.num_attention_heads + 2 * model.query_groups) * model.head_dim
    widest = max(qkv, model.ffn_size * (2 if model.activation == "swiglu" else 1), recipe.padded_vocab_size)
    return max(
        -(-widest // recipe.parallel.tensor_model_parallel_size) * model.hidden_size,
        model.seq_length * model.hidden_size if model.position_embedding == "learned" else 0,
    )


def _norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
