"""Zeros are counted in linear layers alone, patterns are told apart, and a zero that a later stage has lost is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from largeformer.checkpoint.format import Block, write_blocks
from largeformer.compression.pruning.sparsity import assert_zeros_kept, has_pattern, linear_weights, sparsity_metrics
from largeformer.errors import StageFailed
from largeformer.export.streaming import StoredTensors

QKV, GATE = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.1.mlp.linear_fc1.weight_w"
OTHERS = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.layers.0.self_attention.linear_qkv.bias",
    "decoder.layers.0.mlp.linear_fc1.bias_w",
    "decoder.layers.0.input_layernorm.weight",
)


def stored(folder: Path, **changed: torch.Tensor) -> StoredTensors:
    """Two linear weights, a quarter and a half of them 0, and tensors that are 0 throughout and do not count."""
    folder.mkdir()
    tensors = {QKV: torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 1.0]]), GATE: torch.tensor([[0.0, 1.0], [2.0, -0.0]])}
    tensors |= {name: torch.zeros(4) for name in OTHERS} | {{"qkv": QKV, "gate": GATE}[name]: tensor for name, tensor in changed.items()}
    write_blocks(folder / "a.safetensors", [Block(name, t, (0,) * t.dim(), tuple(t.shape)) for name, t in tensors.items()])
    return StoredTensors.of_folder(folder)


def test_only_linear_layers_count(tmp_path: Path) -> None:
    weights = stored(tmp_path / "a")
    assert sorted(linear_weights(weights)) == sorted([QKV, GATE])
    found = sparsity_metrics(weights, (2, 4))
    assert (found["zeros"], found["weights"], found["overall"]) == (4, 12, pytest.approx(1 / 3))
    assert found["by_kind"]["mlp.linear_fc1.weight_w"] == {"least": 0.5, "most": 0.5}
    assert found["pattern"] == "2:4" and found["pattern_holds"] is False


PATTERNS = {
    "two of four": ([[0, 1, 0, 1, 1, 1, 0, 0]], 2, 4, True),
    "fewer than two": ([[0, 0, 0, 1, 0, 0, 0, 0]], 2, 4, True),
    "three in one group": ([[0, 1, 1, 1, 0, 0, 0, 0]], 2, 4, False),
    "two of four, shifted": ([[1, 1, 0, 1, 1, 0, 0, 0]], 2, 4, False),
    "in the second row": ([[0, 0, 1, 1], [0, 1, 1, 1]], 2, 4, False),
    "one of two": ([[0, 1, 1, 0]], 1, 2, True),
    "does not divide": ([[0, 0, 0]], 2, 4, False),
}


@pytest.mark.parametrize(("rows", "kept", "of", "holds"), PATTERNS.values(), ids=PATTERNS)
def test_patterns(rows: list[list[int]], kept: int, of: int, holds: bool) -> None:
    assert has_pattern(torch.tensor(rows), kept, of) is holds


def test_a_zero_that_was_lost_is_found(tmp_path: Path) -> None:
    parent = stored(tmp_path / "parent")
    denser = stored(tmp_path / "denser", gate=torch.tensor([[1e-30, 1.0], [2.0, 0.0]]))
    sparser = stored(tmp_path / "sparser", gate=torch.zeros(2, 2))
    assert assert_zeros_kept(parent, sparser).zeros == 6
    with pytest.raises(StageFailed, match=r"1 pruned weights are not 0 any more, in decoder\.layers\.1\.mlp\.linear_fc1\.weight_w"):
        assert_zeros_kept(parent, denser)
