"""A recipe file to spoil: small, valid, and every section that the cases touch is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from largeformer.config.load import load_recipe
from largeformer.errors import BadInputError

RECIPE = """\
run: {name: small, output_dir: runs/small}
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, seq_length: 32}
tokenizer: {vocab_size: 250}
data: {sources: [{path: mock}]}
train: {precision: bf16, micro_batch_size: 2, global_batch_size: 8, train_iters: 10}
optimizer: {lr: 1.0e-3}
deepspeed: zero1
"""


def write_recipe(folder: Path, text: str = RECIPE) -> str:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems_of(folder: Path, *overrides: str, text: str = RECIPE) -> list[str]:
    """What the loader says against the recipe with these overrides; it must say something."""
    with pytest.raises(BadInputError) as caught:
        load_recipe(write_recipe(folder, text), overrides)
    return caught.value.problems
