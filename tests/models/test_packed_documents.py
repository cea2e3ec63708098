"""Documents packed in one row compute what each computes alone: in our model, and in Hugging Face's, which knows no packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from largeformer.config.schema import Recipe
from largeformer.data.packing import Packing
from largeformer.models.hf_mapping import to_hugging_face
from largeformer.parallel.batch import Batch
from largeformer.parallel.pipeline import forward_loss
from tests.models.test_hf_parity import hugging_face_model, perturb
from tests.one_process import Built, relative_difference
from tests.recipes import GPT2, LLAMA, tiny_recipe

transformers = pytest.importorskip("transformers")

EOD, VOCAB = 249, 250
LENGTHS = [[11, 1, 13, 7], [32]]  # of the documents in each row, their end included
Gradients = dict[str, torch.Tensor]


def documents() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [[torch.cat([torch.randint(0, EOD, (n - 1,), generator=generator), torch.tensor([EOD])]) for n in row] for row in LENGTHS]


def packed(positions: bool, attention: bool = True) -> Batch:
    """Both rows; the last label of a document, which is the first token of the next, does not count."""
    tokens = torch.stack([torch.cat(row) for row in documents()]).numpy()
    labels = np.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    packing = Packing(EOD, reset_attention_mask=attention, reset_position_ids=positions, eod_mask_loss=True)
    return packing.batch(tokens, labels, np.ones(tokens.shape, dtype=np.float32))


def ours(built: Built, batch: Batch) -> tuple[float, Gradients]:
    built.model.zero_grad()
    loss = forward_loss(built.model, batch)
    loss.backward()
    return loss.item(), {name: gradient.clone() for name, gradient in built.gradients().items()}


def each_alone(recipe: Recipe, built: Built) -> tuple[float, Gradients]:
    """Hugging Face's model, one document at a time, positions from 0."""
    twin = hugging_face_model(recipe.model, VOCAB)
    twin.load_state_dict(to_hugging_face(built.weights(), recipe.model), strict=False)
    twin.tie_weights()
    total = torch.zeros(())
    for document in [document for row in documents() for document in row if len(document) > 1]:
        logits = twin(document[None, :-1]).logits[0]
        total = total + F.cross_entropy(logits, document[1:], reduction="sum")
    total.backward()
    return total.item(), {name: parameter.grad for name, parameter in twin.named_parameters()}


def built_of(model: dict[str, Any], backend: str, one_process: Callable[[Recipe], Built]) -> tuple[Recipe, Built]:
    recipe = tiny_recipe(model={**model, "attention_backend": backend})
    built = one_process(recipe)
    perturb(built)
    return recipe, built


def distances(recipe: Recipe, gradients: Gradients, expected: Gradients) -> float:
    mine = to_hugging_face(gradients, recipe.model)
    assert set(mine) == set(expected)
    # Softmax does not see a shift common to all keys, so what their bias has for a gradient is rounding alone.
    return float(np.max([relative_difference(mine[name], expected[name]) for name in expected if not name.endswith("c_attn.bias")]))


@pytest.mark.parametrize("backend", ["sdpa", "local"])
@pytest.mark.parametrize(
    ("model", "positions"),
    [
        pytest.param(LLAMA, False, id="rotary positions go on, and are relative"),
        pytest.param(LLAMA, True, id="rotary positions restart"),
        pytest.param(GPT2, True, id="learned positions restart"),
    ],
)
def test_packed_equals_each_alone(model: dict[str, Any], positions: bool, backend: str, one_process: Callable[[Recipe], Built]) -> None:
    recipe, built = built_of(model, backend, one_process)
    loss, gradients = ours(built, packed(positions))
    expected_loss, expected = each_alone(recipe, built)
    assert loss == pytest.approx(expected_loss, rel=2e-6)
    assert distances(recipe, gradients, expected) < 2e-5


@pytest.mark.parametrize(
    ("model", "positions", "attention"),
    [
        pytest.param(LLAMA, False, False, id="attention across documents"),
        pytest.param(GPT2, True, False, id="attention across documents, learned positions"),
        pytest.param(GPT2, False, True, id="learned positions that go on"),
    ],
)
def test_without_the_switch_they_differ(
    model: dict[str, Any], positions: bool, attention: bool, one_process: Callable[[Recipe], Built]
) -> None:
    recipe, built = built_of(model, "sdpa", one_process)
    loss, gradients = ours(built, packed(positions, attention))
    expected_loss, expected = each_alone(recipe, built)
    assert abs(loss / expected_loss - 1) > 1e-4
    assert distances(recipe, gradients, expected) > 1e-3
