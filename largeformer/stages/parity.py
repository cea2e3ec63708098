"""Is this recipe's layout computing the same thing as one process? Loss, gradient norm, every parameter's gradient.

Compared in float32, where a wrong layout cannot hide behind rounding, and in the recipe's precision beside it. Dropout is off:
it draws differently at every layout. The tokens are random, and masked unevenly.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from largeformer.config.deepspeed import load_deepspeed
from largeformer.config.deepspeed_rules import owned_values
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe

if TYPE_CHECKING:
    from largeformer.training.parity import Difference, Measurement

MEASURE_INTO = "LARGEFORMER_PARITY_OUTPUT"
_SHOWN = 5


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors of numbers, and of tensors by their norm."""

    numbers: float
    tensors: float


# The tests hold small models to 1e-6 and 5e-6. A recipe of full size sums thousands of times as many terms, in another order.
TOLERANCES = {"fp32": Tolerance(1e-5, 5e-5), "bf16": Tolerance(2e-2, 1e-1), "fp16": Tolerance(2e-2, 1e-1)}


def run(recipe: Recipe, nproc: int) -> int:
    """Compare on `nproc` ranks of this machine. Returns the exit code: 0 where all is within tolerance, else 1."""
    output = os.environ.get(MEASURE_INTO)
    if output is not None:
        _measure(recipe, Path(output))
        return 0
    passed = True
    for precision in dict.fromkeys(("fp32", recipe.train.precision)):
        reference, layout = _run_both(comparable(recipe, precision), nproc)
        passed &= _report(recipe, nproc, precision, reference, layout)
    return 0 if passed else 1


def comparable(recipe: Recipe, precision: str) -> Recipe:
    """The recipe as parity runs it: without dropout, at `precision`, and with plain SGD: Adam's first step is the gradient's sign,
    which rounding decides wherever a gradient is nearly nothing."""
    model = recipe.model.model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    # A static loss scale: a dynamic one begins so high that its first step overflows.
    train = recipe.train.model_copy(update={"precision": precision, "loss_scale": 128.0})
    optimizer = recipe.optimizer.model_copy(update={"type": "sgd", "momentum": 0.0, "backend": "auto"})
    return recipe.model_copy(update={"model": model, "train": train, "optimizer": optimizer})


def one_process(recipe: Recipe) -> Recipe:
    """The same training on a single rank: nothing split, and ZeRO only where the precision needs it."""
    parallel = type(recipe.parallel)()
    deepspeed = "zero0" if recipe.train.precision == "fp32" else "zero1"
    return recipe.model_copy(update={"parallel": parallel, "deepspeed": deepspeed})


def _measure(recipe: Recipe, output: Path) -> None:
    from largeformer.stages.common.world import enter_world
    from largeformer.training.parity import measure

    with enter_world(recipe) as world:
        measurement = measure(recipe, world.groups, world.device, world.deepspeed)
        if world.info.is_main:
            measurement.write(output)


def _run_both(recipe: Recipe, nproc: int) -> tuple[Measurement, Measurement]:
    from largeformer.launching.local import spawn
    from largeformer.training.parity import Measurement

    measured = []
    with tempfile.TemporaryDirectory(prefix="largeformer-parity-") as folder:
        for name, ranks, variant in (("one", 1, one_process(recipe)), ("layout", nproc, _disowned(recipe, Path(folder)))):
            path, output = Path(folder) / f"{name}.yaml", Path(folder) / f"{name}.safetensors"
            path.write_text(recipe_yaml(variant))
            code = spawn(ranks, ["parity", "-c", str(path), "--nproc", str(ranks)], {**os.environ, MEASURE_INTO: str(output)})
            if code != 0:
                raise RuntimeError(f"parity could not run the recipe on {ranks} ranks: exit code {code}, see above")
            measured.append(Measurement.read(output))
    return measured[0], measured[1]


def _disowned(recipe: Recipe, folder: Path) -> Recipe:
    """With a DeepSpeed config that says nothing of what the recipe owns: what agreed with the recipe need not agree with its variant."""
    written = copy.deepcopy(load_deepspeed(recipe))
    for owned in owned_values(recipe):
        section, _, name = owned.key.rpartition(".")
        place = written.get(section) if section else written
        if isinstance(place, dict):
            place.pop(name, None)
    path = folder / f"{Path(recipe.deepspeed).stem}.json"
    path.write_text(json.dumps(written))
    return recipe.model_copy(update={"deepspeed": str(path)})


def _report(recipe: Recipe, nproc: int, precision: str, reference: Measurement, layout: Measurement) -> bool:
    from largeformer.training.parity import compare

    tolerance = TOLERANCES[precision]
    differences = compare(reference, layout)
    failed = [d for d in differences if d.error > _allowed(d, tolerance)]
    p = recipe.parallel
    print(
        f"{precision}: tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size} on {nproc} ranks, "
        f"{Path(recipe.deepspeed).stem}, against one process"
    )
    numbers = [d for d in differences if " " not in d.what]
    tensors = sorted((d for d in differences if " " in d.what), key=lambda d: -d.error)
    for difference in numbers:
        values = f"{getattr(layout, difference.what):.8f} against {getattr(reference, difference.what):.8f}"
        print(f"  {difference.what:<10} {values}   error {difference.error:.1e}   allowed {tolerance.numbers:.0e}")
    print(f"  {len(tensors)} tensors, the farthest:")
    for difference in tensors[:_SHOWN]:
        print(f"    {difference.what:<70} error {difference.error:.1e}   allowed {tolerance.tensors:.0e}")
    print(f"  {'SAME' if not failed else f'DIFFERENT: {len(failed)} of {len(differences)} beyond what is allowed'}")
    return not failed


def _allowed(difference: Difference, tolerance: Tolerance) -> float:
    return tolerance.tensors if " " in difference.what else tolerance.numbers
