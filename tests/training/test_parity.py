"""Every layout computes what one process computes: loss, gradient norm, each gradient, each value after a step.

The reference is one rank without ZeRO, whose model is itself compared with Hugging Face's in tests/models/test_hf_parity.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from largeformer.config.schema import Recipe
from tests.distributed import RankPool
from tests.recipes import GPT2, LLAMA, tiny_recipe
from tests.training.layouts import measured, zero

Pools = Callable[[int], RankPool]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "init_method_std": 0.1},
    "llama-tied": {**LLAMA, "init_method_std": 0.1, "tie_embeddings": True},
    "gpt2": {**GPT2, "init_method_std": 0.1},
}
GLOBAL_BATCH = 8
SGD = {"type": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.01, "clip_grad": 1.0}


@dataclass(frozen=True)
class Case:
    name: str
    ranks: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    sequence: bool = False
    stage: int = 0
    more: dict[str, Any] = field(default_factory=dict)
    first: int | None = None
    models: tuple[str, ...] = ("llama", "gpt2")
    accumulation: tuple[int, ...] = (1, 4)
    numbers: float = 1e-6

    @property
    def data(self) -> int:
        return self.ranks // (self.tensor * self.pipeline)


CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = [
    Case("dp2-zero0", 2),
    Case("dp2-zero1", 2, stage=1),
    Case("dp2-zero2", 2, stage=2),
    Case("dp2-zero3", 2, stage=3, models=("llama", "llama-tied", "gpt2")),
    Case("tp2", 2, tensor=2),
    Case("tp2-zero1", 2, tensor=2, stage=1),
    Case("tp2-zero2", 2, tensor=2, stage=2),
    Case("tp2-zero3", 2, tensor=2, stage=3),
    Case("tp2-sp", 2, tensor=2, sequence=True),
    Case("tp2-sp-zero3", 2, tensor=2, sequence=True, stage=3, models=("gpt2",)),
    Case("pp2", 2, pipeline=2, models=("llama", "llama-tied", "gpt2")),
    Case("pp2-zero1", 2, pipeline=2, stage=1, models=("llama", "llama-tied", "gpt2")),
    Case("pp2-uneven", 2, pipeline=2, first=1, accumulation=(4,)),
    Case("pp2-vp2", 2, pipeline=2, virtual=2, accumulation=(2, 4), models=("llama", "llama-tied", "gpt2")),
    Case("pp2-vp2-zero1", 2, pipeline=2, virtual=2, stage=1, accumulation=(2,)),
    Case("tp2-dp2-zero1", 4, tensor=2, stage=1, models=("gpt2",)),
    Case("tp2-dp2-sp-zero2", 4, tensor=2, sequence=True, stage=2, models=("llama",)),
    Case("tp2-pp2-sp", 4, tensor=2, pipeline=2, sequence=True, models=("llama", "llama-tied")),
    Case("tp2-pp2-sp-zero1", 4, tensor=2, pipeline=2, sequence=True, stage=1, models=("gpt2",)),
    Case("tp4", 4, tensor=4, models=("gpt2",), accumulation=(1,)),
    Case("pp2-dp2-zero1", 4, pipeline=2, stage=1, models=("gpt2",), accumulation=(2,)),
    Case("pp4", 4, pipeline=4, models=("gpt2",), accumulation=(4,)),
]


def _recipe(case: Case, model: str, accumulation: int, optimizer: dict[str, Any], precision: str = "fp32") -> Recipe:
    return tiny_recipe(
        model=MODELS[model],
        parallel={
            "tensor_model_parallel_size": case.tensor,
            "pipeline_model_parallel_size": case.pipeline,
            "virtual_pipeline_model_parallel_size": case.virtual,
            "sequence_parallel": case.sequence,
            "num_layers_in_first_pipeline_stage": case.first,
        },
        train={"micro_batch_size": GLOBAL_BATCH // (case.data * accumulation), "global_batch_size": GLOBAL_BATCH, "precision": precision},
        optimizer=optimizer,
    )


@pytest.fixture(scope="module")
def references(ranks: Pools) -> Callable[..., Any]:
    """One process's measurement of a model, made once."""
    made: dict[tuple[str, str, str], Any] = {}

    def reference(model: str, optimizer: dict[str, Any] = SGD, precision: str = "fp32") -> Any:
        key = (model, optimizer["type"], precision)
        if key not in made:
            recipe = _recipe(Case("one", 1), model, 1, optimizer, precision)
            made[key] = measured(ranks(1), recipe, zero(0 if precision == "fp32" else 1))
        return made[key]

    return reference


def _check(reference: Any, other: Any, numbers: float, tensors: float) -> None:
    from largeformer.training.parity import compare

    allowed = {"loss": numbers, "grad_norm": numbers, "next_loss": numbers}
    differences = compare(reference, other)
    assert len(differences) == 3 + 2 * len(reference.gradients) and reference.gradients, "a tensor is missing"
    wrong = {d.what: d.error for d in differences if d.error > allowed.get(d.what, tensors)}
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("case", "model", "accumulation"),
    [
        pytest.param(c, m, a, id=f"{c.name}-{m}-gas{a}")
        for c in sorted(CASES, key=lambda c: c.ranks)
        for m in c.models
        for a in c.accumulation
    ],
)
def test_layout_equals_one_process(ranks: Pools, references: Callable[..., Any], case: Case, model: str, accumulation: int) -> None:
    reference = references(model)
    layout = measured(ranks(case.ranks), _recipe(case, model, accumulation, SGD), zero(case.stage, **case.more))
    _check(reference, layout, case.numbers, 5e-6)


ADAM = {"type": "adamw", "lr": 1.0e-2, "weight_decay": 0.1, "clip_grad": 1.0, "eps": 1.0e-5}
ADAM_CASES = [Case("dp2-zero1", 2, stage=1), Case("tp2-sp-zero3", 2, tensor=2, sequence=True, stage=3), Case("pp2", 2, pipeline=2)]


@pytest.mark.parametrize("case", ADAM_CASES, ids=lambda c: c.name)
def test_adam_steps_alike(ranks: Pools, references: Callable[..., Any], case: Case) -> None:
    """Within 1 % of the step, element by element.

    Adam's first step is the gradient's sign, which rounding decides where the gradient is nothing else: hence an `eps` above
    it, and no biases (softmax is blind to that of the keys).
    """
    reference = references("llama", ADAM)
    layout = measured(ranks(case.ranks), _recipe(case, "llama", 1, ADAM), zero(case.stage))
    farthest = {key: (value - layout.values[key]).abs().max().item() for key, value in reference.values.items()}
    assert all(distance <= 0.01 * ADAM["lr"] for distance in farthest.values()), farthest


OFFLOAD_CASES = [
    Case("zero2-cpu", 2, stage=2, more=CPU_OFFLOAD, numbers=1e-4),
    Case("zero3-cpu", 2, stage=3, more={**CPU_OFFLOAD, "offload_param": {"device": "cpu"}}, numbers=1e-4),
    Case("zero1-cpu-tp2", 2, tensor=2, stage=1, more=CPU_OFFLOAD, numbers=1e-4),
    Case("zero1-cpu-pp2", 2, pipeline=2, stage=1, more=CPU_OFFLOAD, numbers=1e-4),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", OFFLOAD_CASES, ids=lambda c: c.name)
def test_cpu_offload_equals_one_process(ranks: Pools, references: Callable[..., Any], case: Case) -> None:
    """With DeepSpeed's CPU Adam, which rounds differently from PyTorch's."""
    reference = references("llama", ADAM)
    layout = measured(ranks(case.ranks), _recipe(case, "llama", 4, ADAM), zero(case.stage, **case.more))
    _check(reference, layout, case.numbers, 1e-4)


BF16_CASES = [
    Case("dp2-zero1", 2, stage=1),
    Case("dp2-zero2", 2, stage=2),
    Case("dp2-zero3", 2, stage=3),
    Case("tp2-sp-zero1", 2, tensor=2, sequence=True, stage=1),
    Case("pp2-zero1", 2, pipeline=2, stage=1),
    Case("pp2-vp2-zero1", 2, pipeline=2, virtual=2, stage=1),
    Case("tp2-pp2-sp-zero1", 4, tensor=2, pipeline=2, sequence=True, stage=1),
]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.ranks > 2 else []) for c in BF16_CASES])
def test_bf16_stays_near_fp32(ranks: Pools, references: Callable[..., Any], case: Case) -> None:
    """Against one process in float32: what bfloat16's 8 bits allow, and no more. The model is tied, so that stages share a weight."""
    reference = references("llama-tied")
    layout = measured(ranks(case.ranks), _recipe(case, "llama-tied", 4, SGD, "bf16"), zero(case.stage))
    assert abs(layout.loss / reference.loss - 1) < 2e-2
    assert abs(layout.grad_norm / reference.grad_norm - 1) < 2e-2
    assert abs(layout.next_loss / reference.next_loss - 1) < 2e-2
