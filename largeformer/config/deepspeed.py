"""The DeepSpeed side of a recipe: read the JSON, check it against the recipe, fill in what is `"auto"`.

The JSON owns ZeRO, offload, communication and AIO. Batch sizes, clipping and precision belong to the recipe; they stand
in the JSON as `"auto"` or not at all, and a number that stands in both places must agree. `"auto"` anywhere else is
DeepSpeed's default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from largeformer.config.chain import TrainedSection, at_stage
from largeformer.config.checks import calibration_problems, world_problems
from largeformer.config.deepspeed_keys import REFUSED
from largeformer.config.deepspeed_rules import AUTO, Owned, ZeroConfig, disagreements, key_problems, owned_values, zero_problems
from largeformer.config.resources import find_deepspeed
from largeformer.config.schema import Recipe
from largeformer.config.size import largest_parameter, layer_parameters, rank_parameters
from largeformer.errors import BadInputError

__all__ = ["ZeroConfig", "check_world", "deepspeed_problems", "load_deepspeed", "resolve_deepspeed", "resolve_for_run"]

_NEVER = 1_000_000_000  # steps between DeepSpeed's own progress lines, which would repeat the tracker's
_LARGEST_BUCKET = 500_000_000  # elements, DeepSpeed's default
_LARGEST_PREFETCH = 50_000_000  # elements, DeepSpeed's default
_GRAIN = 1024  # bucket sizes are rounded up to it; DeepSpeed wants them even
_SWAP_GRAIN = 1 << 20  # likewise for swap buffers, which AIO reads in aligned blocks


def load_deepspeed(recipe: Recipe) -> dict[str, Any]:
    """The JSON that `recipe.deepspeed` names, as written. Raises BadInputError, with the line, where it is not JSON."""
    path = find_deepspeed(recipe.deepspeed)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadInputError(f"{path}, line {error.lineno} column {error.colno}, is not valid JSON: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise BadInputError(f'{path} holds a {type(raw).__name__}, not an object such as {{"zero_optimization": {{...}}}}')
    return raw


def deepspeed_problems(recipe: Recipe, raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the JSON beside this recipe, whatever the world size."""
    return [*key_problems(raw, recipe.deepspeed), *disagreements(recipe, raw, owned_values(recipe)), *zero_problems(recipe, raw)]


def check_world(recipe: Recipe, deepspeed: Mapping[str, Any], world_size: int) -> list[str]:
    """What is wrong on `world_size` ranks: the layout, every batch size on the way, and the accumulation steps of the JSON."""
    problems = world_problems(recipe, world_size)
    return problems or list(disagreements(recipe, deepspeed, [_accumulation(recipe, world_size)]))


def resolve_deepspeed(recipe: Recipe, raw: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """The dict that DeepSpeed is given: `raw` with everything that the recipe owns filled in, and no `"auto"` left.

    Raises BadInputError with every problem of `raw` beside the recipe and of both on `world_size` ranks.
    """
    problems = _problems(recipe, raw, world_size)
    if problems:
        raise BadInputError(problems)
    values = {owned.key: owned.value for owned in (*owned_values(recipe), _accumulation(recipe, world_size))}
    resolved = dict(raw)
    for precision in ("fp16", "bf16"):
        if recipe.train.precision != precision:
            resolved[precision] = {}  # What is said about a precision that is off is of no effect.
    for key, value in (values | dict(_settings(recipe, ZeroConfig.of(raw)))).items():
        resolved = _filled(resolved, key.split("."), value)
    return _without_auto(resolved)


def resolve_for_run(recipe: Recipe, raw: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """`resolve_deepspeed`, for a recipe whose `run.stages` may train otherwise than the recipe itself: what is wrong with them on this
    world is raised along, so that it is told before the first stage has run. A sentence that several have in common is told once."""
    told = dict.fromkeys(_problems(recipe, raw, world_size), "")
    for entry in recipe.run.stages:
        if isinstance(getattr(recipe, entry.stage, None), TrainedSection):
            there = at_stage(recipe, entry)
            own = _problems(there, raw, world_size) or calibration_problems(there, entry.stage, world_size)
            told |= {problem: f"in {entry.name}: " for problem in own if problem not in told}
    if told:
        raise BadInputError([place + problem for problem, place in told.items()])
    return resolve_deepspeed(recipe, raw, world_size)


def _problems(recipe: Recipe, raw: Mapping[str, Any], world_size: int) -> list[str]:
    return [*deepspeed_problems(recipe, raw), *check_world(recipe, raw, world_size)]


def _accumulation(recipe: Recipe, world_size: int) -> Owned:
    train = recipe.train
    steps = train.global_batch_size // (train.micro_batch_size * recipe.layout(world_size).data)
    return Owned("gradient_accumulation_steps", steps, "train.global_batch_size / (train.micro_batch_size x data parallel)")


def _settings(recipe: Recipe, zero: ZeroConfig) -> Iterator[tuple[str, Any]]:
    """Key and value of what this recipe wants where the JSON leaves it open."""
    yield "steps_per_print", _NEVER
    if recipe.train.precision == "bf16":
        # DeepSpeed's bf16 optimizer needs the first for the second when gradients come from a schedule outside the engine.
        yield "bf16.immediate_grad_update", True
        yield "data_types.grad_accum_dtype", "fp32"
    if recipe.train.precision == "fp16":
        yield "data_types.grad_accum_dtype", "fp32"
    if zero.stage == 0:
        return
    if recipe.optimizer.type == "sgd":
        yield "zero_allow_untested_optimizer", True
    if zero.offload_optimizer != "none":
        adam = recipe.optimizer.type != "sgd"
        yield "zero_force_ds_cpu_optimizer", adam and recipe.optimizer.backend in ("auto", "deepspeed_cpu")
    # Under a pipeline, ZeRO 1 allocates the whole bucket: no larger than what a rank holds.
    bucket = min(_rounded_up(rank_parameters(recipe), _GRAIN), _LARGEST_BUCKET)
    yield "zero_optimization.overlap_comm", False
    yield "zero_optimization.reduce_bucket_size", bucket
    yield "zero_optimization.allgather_bucket_size", bucket
    if zero.stage == 3:
        yield from _stage3_settings(recipe, zero)


def _stage3_settings(recipe: Recipe, zero: ZeroConfig) -> Iterator[tuple[str, Any]]:
    layer = layer_parameters(recipe.model) // recipe.parallel.tensor_model_parallel_size
    yield "zero_optimization.stage3_prefetch_bucket_size", min(layer, _LARGEST_PREFETCH)
    # Norms and biases stay whole on every rank; matrices are partitioned.
    yield "zero_optimization.stage3_param_persistence_threshold", 10 * recipe.model.hidden_size
    for what, device in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if device == "nvme":
            yield f"zero_optimization.{what}.nvme_path", str(Path(recipe.run.output_dir) / "nvme_swap")
    if zero.offload_param == "nvme":
        yield "zero_optimization.offload_param.buffer_size", _rounded_up(largest_parameter(recipe), _SWAP_GRAIN)


def _filled(tree: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of `tree` with `value` at `keys`, where nothing or "auto" stands there."""
    head, *rest = keys
    here = tree.get(head)
    if rest:
        return {**tree, head: _filled(here if isinstance(here, Mapping) else {}, rest, value)}
    return {**tree, head: value} if here in (None, AUTO) else dict(tree)


def _without_auto(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`tree` without what is left to DeepSpeed, refused keys that switch nothing on included."""
    kept = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            value = _without_auto(value, f"{prefix}{name}.")
        if value is not None and value != AUTO and prefix + name not in REFUSED:
            kept[name] = value
    return kept


def _rounded_up(count: int, grain: int) -> int:
    return -(-count // grain) * grain


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'key "{key}" stands twice: keep one')
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number: write a finite one")
