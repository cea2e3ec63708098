"""Zeros by magnitude, Wanda and SparseGPT: as llm-compressor sets them on the Hugging Face twin, in the pattern asked for, alike at every
layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from largeformer.compression.pruning.magnitude import kth_smallest
from largeformer.compression.pruning.sparsity import has_pattern, linear_weights
from largeformer.compression.pruning.unstructured import pattern_problems, sparsify
from largeformer.config.prune import PruneConfig
from largeformer.config.schema import Recipe
from largeformer.models.gather import gather_full, load_full
from largeformer.models.hf_config import hugging_face_config
from largeformer.models.hf_mapping import to_hugging_face
from tests.compression.models import at, model_on
from tests.compression.pruning.test_structured import Held
from tests.distributed import RankContext
from tests.recipes import GPT2, LLAMA, tiny_recipe

ROWS = 8
Tensors = dict[str, torch.Tensor]
LAYOUTS = {"TP2": (2, 2), "DP2": (2, 1)}
RECIPE = tiny_recipe(model={**LLAMA, "num_layers": 2})


def settings(**keys: Any) -> PruneConfig:
    return PruneConfig.model_validate({"block_size": 32, **keys})


def sparsified(ranks: RankContext, recipe: Recipe, prunes: list[PruneConfig], start: Tensors | None = None) -> tuple[Tensors, Tensors, Any]:
    """All weights before and after, on rank 0, and the rows of ids that were looked at."""
    with model_on(ranks, recipe) as model:
        batches = model.batches(recipe, ROWS)
        if start is not None:
            load_full(model.shards, start)

        def weights() -> Tensors:
            return gather_full(model.shards, lambda shard: shard.of(shard.parameter).clone())

        before = weights()
        for prune in prunes:
            sparsify(model.chunk, model.shards, model.groups, recipe.model, prune, batches)
        return before, weights(), [batch.tokens for batch in batches]


METHODS = {
    "wanda": {"method": "wanda"},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.6},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
}


@pytest.mark.parametrize("keys", METHODS.values(), ids=METHODS)
def test_as_llm_compressor_on_the_exported_twin(ranks: Any, keys: dict[str, Any], tmp_path: Path) -> None:
    prune = settings(**keys)
    before, after, tokens = ranks(1).run(sparsified, RECIPE, [prune])[0]
    theirs = by_llm_compressor(before, torch.cat(tokens), prune, tmp_path)
    ours = to_hugging_face(after, RECIPE.model)
    for name, tensor in theirs.items():
        different = ((ours[name] == 0) != (tensor == 0)).float().mean()
        assert different <= 1e-3, (name, float(different))
        same = (ours[name] == 0) == (tensor == 0)
        assert float((ours[name] - tensor)[same].abs().max()) < 1e-4, name
        assert name in ("model.embed_tokens.weight", "lm_head.weight") or "norm" in name or (tensor == 0).float().mean() > 0.4


def by_llm_compressor(weights: Tensors, tokens: torch.Tensor, prune: PruneConfig, folder: Path) -> Tensors:
    compressor = pytest.importorskip("llmcompressor")
    pruning = pytest.importorskip("llmcompressor.modifiers.pruning")
    datasets, transformers, tokenizers = (pytest.importorskip(name) for name in ("datasets", "transformers", "tokenizers"))
    config = transformers.LlamaConfig(**hugging_face_config(RECIPE.model, RECIPE.tokenizer.vocab_size))
    twin = transformers.LlamaForCausalLM(config)
    twin.load_state_dict(to_hugging_face(weights, RECIPE.model))
    twin.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    about: dict[str, Any] = {"sparsity": prune.share, "ignore": ["re:.*lm_head"], "mask_structure": prune.pattern or "0:0"}
    if prune.method == "wanda":
        modifier = pruning.WandaPruningModifier(**about)
    else:
        modifier = pruning.SparseGPTModifier(**about, block_size=prune.block_size, dampening_frac=prune.dampening)
    rows = tokens.tolist()
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    compressor.oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=[modifier],
        num_calibration_samples=len(rows),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
        processor=transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="a"),
    )
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", METHODS.values(), ids=METHODS)
def test_alike_at_every_layout(ranks: Any, keys: dict[str, Any], layout: str) -> None:
    """Sums in another order may turn a tie, no more."""
    world, tensor = LAYOUTS[layout]
    _, one, _ = ranks(1).run(sparsified, RECIPE, [settings(**keys)])[0]
    _, other, _ = ranks(world).run(sparsified, at(RECIPE, tensor), [settings(**keys)])[0]
    for name in linear_weights(Held(one)):
        same = (one[name] == 0) == (other[name] == 0)
        assert float(same.float().mean()) > 0.999, name
        assert float((one[name] - other[name])[same].abs().max()) < 1e-4, name
        assert keys.get("pattern") is None or has_pattern(other[name], 2, 4)


def heads(weight: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values of linear_qkv, by the tiny model's 2 groups of 2 heads of 16."""
    grouped = weight.view(2, 4, 16, -1)
    return [grouped[:, :2], grouped[:, 2], grouped[:, 3]]


MAGNITUDE = {
    "local": {"sparsity": 0.3},
    "global": {"scope": "global", "sparsity": 0.3},
    "threshold": {"threshold": 0.1},
    "2:4": {"pattern": "2:4"},
    "1:4": {"pattern": "1:4"},
}


@pytest.mark.parametrize("keys", MAGNITUDE.values(), ids=MAGNITUDE)
def test_by_magnitude(ranks: Any, keys: dict[str, Any]) -> None:
    before, after, _ = ranks(1).run(sparsified, RECIPE, [settings(method="magnitude", **keys)])[0]
    names = linear_weights(Held(before))
    assert len(names) == 2 * 5
    everything = torch.cat([before[name].abs().flatten() for name in names])
    for name in names:
        weight, zeros = before[name], after[name] == 0
        assert torch.equal(after[name], weight.masked_fill(zeros, 0.0))
        if "pattern" in keys:
            kept = int(keys["pattern"][0])
            groups, left = weight.abs().view(-1, 4), (~zeros).view(-1, 4)
            assert torch.equal(left.sum(-1), torch.full((len(left),), kept)) and has_pattern(after[name], kept, 4)
            assert (groups.masked_fill(~left, 9).amin(-1) >= groups.masked_fill(left, 0).amax(-1)).all()
        elif "threshold" in keys:
            assert torch.equal(zeros, weight.abs() < 0.1)
        elif keys.get("scope") == "global":
            assert torch.equal(zeros, weight.abs() <= everything.sort().values[int(len(everything) * 0.3) - 1])
        else:
            for matrix, holes in zip(heads(weight), heads(zeros), strict=True) if "qkv" in name else [(weight, zeros)]:
                assert int(holes.sum()) == int(matrix.numel() * 0.3)
                assert matrix.abs()[holes].max() <= matrix.abs()[~holes].min()
    unchanged = set(before) - set(names)
    assert all(torch.equal(before[name], after[name]) for name in unchanged)
    _, other, _ = ranks(2).run(sparsified, at(RECIPE, 2), [settings(method="magnitude", **keys)])[0]
    assert all(torch.equal(after[name], other[name]) for name in after)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_what_is_zero_stays_zero_and_counts(ranks: Any, method: str) -> None:
    first, second = settings(method="magnitude", sparsity=0.4), settings(method=method, sparsity=0.5)
    recipe = tiny_recipe(model={**GPT2, "num_layers": 2})
    _, half, _ = ranks(1).run(sparsified, recipe, [first])[0]
    _, more, _ = ranks(1).run(sparsified, recipe, [second], half)[0]
    for name in linear_weights(Held(half)):
        assert not ((half[name] == 0) & (more[name] != 0)).any(), name
        assert float((more[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name


def test_the_kth_smallest_of_parts_on_several_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator).abs() for n in (5, 1000, 7)]
    values[2][:4] = 0.25
    counts = [0, 613, 2]

    def twice(local: torch.Tensor) -> torch.Tensor:  # two ranks that hold the same
        return 2 * local

    found = kth_smallest([[part] for part in values], [2 * count for count in counts], twice)
    assert found == [-1.0, float(values[1].sort().values[612]), float(values[2].sort().values[1])]
    assert kth_smallest([values], [int(sum(map(len, values)))], lambda local: local) == [float(torch.cat(values).max())]


PATTERNS = {
    "fits": ({"method": "wanda", "pattern": "2:4"}, []),
    "no divisor": ({"method": "wanda", "pattern": "2:5"}, ["hidden_size 64", "ffn_hidden_size 96", "head size 64"]),
    "not of the block": ({"method": "sparsegpt", "pattern": "2:4", "block_size": 30}, ["prune.block_size 30"]),
}


@pytest.mark.parametrize(("keys", "parts"), PATTERNS.values(), ids=PATTERNS)
def test_patterns_that_do_not_divide(keys: dict[str, Any], parts: list[str]) -> None:
    problems = pattern_problems(RECIPE.model, settings(**keys))
    assert len(problems) == len(parts) and all(part in problem for part, problem in zip(parts, problems, strict=True))
