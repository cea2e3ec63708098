"""Recipes small enough for a test: every dimension differs, so that a swapped pair shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largeformer.config.schema import Recipe

TINY: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 32,
        "make_vocab_size_divisible_by": 8,
    },
    "tokenizer": {"vocab_size": 250},
    "data": {"sources": [{"path": "mock"}]},
    "train": {"precision": "fp32", "micro_batch_size": 2, "global_batch_size": 4, "train_iters": 4, "loss_chunk_size": 24},
    "optimizer": {"lr": 1.0e-3},
}

LLAMA: dict[str, Any] = {"normalization": "RMSNorm", "activation": "swiglu", "position_embedding": "rope"}
GPT2: dict[str, Any] = {
    "normalization": "LayerNorm",
    "activation": "gelu_tanh",
    "position_embedding": "learned",
    "num_query_groups": None,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "tie_embeddings": True,
}


def python_sources(*packages: str) -> list[dict[str, str]]:
    """The modules of Python's own `packages` to train on, and one of a thousand tokens each to validate and to test on."""
    library = Path(json.__file__).parent.parent
    train = [{"path": str(library / name / "*.py"), "split": "1,0,0"} for name in packages]
    return [*train, {"path": str(library / "json/scanner.py"), "split": "0,1,0"}, {"path": str(library / "json/tool.py"), "split": "0,0,1"}]


def tiny_recipe(**sections: Mapping[str, Any] | str) -> Recipe:
    """A Llama of 4 layers with grouped queries, fp32 and mock data, over a vocabulary of 250 that is padded (to 256).

    Each keyword is a section and overrides keys in it: `tiny_recipe(model=GPT2, parallel={"sequence_parallel": True})`.
    """
    merged: dict[str, Any] = dict(TINY)
    for name, values in sections.items():
        merged[name] = values if isinstance(values, str) else {**TINY.get(name, {}), **values}
    return Recipe.model_validate(merged)
