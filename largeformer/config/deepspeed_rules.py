"""What a DeepSpeed JSON may say, alone and beside a recipe. Sentences out, as in `checks`; `raw` is the JSON as written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from largeformer.config.deepspeed_keys import HARMLESS, REFUSED, SECTIONS, TOP_LEVEL
from largeformer.config.schema import Recipe
from largeformer.config.sentences import did_you_mean, shown

AUTO = "auto"
Device = Literal["none", "cpu", "nvme"]
_DEVICES: tuple[Device, ...] = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class ZeroConfig:
    """What the rest of largeformer asks about ZeRO."""

    stage: int
    offload_optimizer: Device
    offload_param: Device
    overlap_comm: bool

    @classmethod
    def of(cls, deepspeed: Mapping[str, Any]) -> ZeroConfig:
        """From a DeepSpeed dict, as written or resolved. Off is the default of everything, `overlap_comm` at stage 3 included."""
        return cls(
            stage=lookup(deepspeed, "zero_optimization.stage") or 0,
            offload_optimizer=lookup(deepspeed, "zero_optimization.offload_optimizer.device") or "none",
            offload_param=lookup(deepspeed, "zero_optimization.offload_param.device") or "none",
            overlap_comm=lookup(deepspeed, "zero_optimization.overlap_comm") is True,
        )


class Owned(NamedTuple):
    """A value of the recipe under its key in the JSON, and the recipe's key that owns it."""

    key: str
    value: Any
    owner: str


def lookup(tree: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def owned_values(recipe: Recipe) -> list[Owned]:
    """What the recipe owns of the JSON and the world size does not change."""
    train = recipe.train
    values = [
        Owned("train_batch_size", train.global_batch_size, "train.global_batch_size"),
        Owned("train_micro_batch_size_per_gpu", train.micro_batch_size, "train.micro_batch_size"),
        Owned("gradient_clipping", recipe.optimizer.clip_grad, "optimizer.clip_grad"),
        Owned("bf16.enabled", train.precision == "bf16", "train.precision"),
        Owned("fp16.enabled", train.precision == "fp16", "train.precision"),
    ]
    if train.precision == "fp16":
        values += [
            Owned("fp16.loss_scale", train.loss_scale, "train.loss_scale"),
            Owned("fp16.initial_scale_power", train.initial_loss_scale_power, "train.initial_loss_scale_power"),
            Owned("fp16.loss_scale_window", train.loss_scale_window, "train.loss_scale_window"),
            Owned("fp16.hysteresis", train.loss_scale_hysteresis, "train.loss_scale_hysteresis"),
            Owned("fp16.min_loss_scale", train.min_loss_scale, "train.min_loss_scale"),
        ]
    return values


def key_problems(raw: Mapping[str, Any], place: str) -> Iterator[str]:
    """Unknown and refused keys, and sections that are none. `place` names the file."""
    yield from _section_problems(raw, "", TOP_LEVEL, place)
    for section, known in SECTIONS.items():
        yield from _section_problems(lookup(raw, section), section, known, place)


def disagreements(recipe: Recipe, raw: Mapping[str, Any], values: list[Owned]) -> Iterator[str]:
    """Numbers that stand in both files and differ."""
    for key, value, owner in values:
        given = lookup(raw, key)
        if given is None or given == AUTO or (given == value and isinstance(given, bool) == isinstance(value, bool)):
            continue
        theirs = f"{owner} is {recipe.train.precision}" if owner == "train.precision" else f"{owner} is {value}"
        yield f'{recipe.deepspeed}: {key} is {shown(given)}, but in the recipe {theirs}: write "auto" there, or make them agree'


def zero_problems(recipe: Recipe, raw: Mapping[str, Any]) -> Iterator[str]:
    """What ZeRO and offload cannot do, alone or with this recipe's precision, pipeline and optimizer."""
    place = recipe.deepspeed
    wrong = list(_zero_type_problems(raw, place))
    if wrong or not isinstance(raw.get("zero_optimization", {}), Mapping):  # The latter `key_problems` has told.
        yield from wrong
        return
    zero, precision, stages = ZeroConfig.of(raw), recipe.train.precision, recipe.parallel.pipeline_model_parallel_size
    if zero.stage >= 2 and stages > 1:
        yield (
            f"{place}: ZeRO stage {zero.stage} reduces gradients in every backward, which parallel.pipeline_model_parallel_size {stages} "
            "does not allow: use deepspeed=zero1, or one pipeline stage"
        )
    if zero.overlap_comm and stages > 1:
        yield (
            f"{place}: zero_optimization.overlap_comm true leaves gradients unreduced with parallel.pipeline_model_parallel_size {stages}, "
            "whose backward reduces them at its end: set it to false, or use one pipeline stage"
        )
    if zero.stage == 0 and precision != "fp32":
        yield f"{place}: ZeRO stage 0 does not train train.precision {precision} correctly: use deepspeed=zero1, or train.precision fp32"
    if zero.offload_optimizer != "none" and zero.stage == 0:
        yield f"{place}: offload_optimizer to {zero.offload_optimizer} needs ZeRO stage 1 or above, not 0: use deepspeed=zero2_offload_cpu"
    elif zero.offload_optimizer == "nvme" and zero.stage != 3:
        yield f"{place}: offload_optimizer to nvme needs ZeRO stage 3, not {zero.stage}: use deepspeed=zero3_offload_nvme, or device cpu"
    if zero.offload_param != "none" and zero.stage != 3:
        yield f"{place}: offload_param to {zero.offload_param} needs ZeRO stage 3, not {zero.stage}: use deepspeed=zero3_offload_cpu"
    if zero.offload_optimizer != "none" and recipe.optimizer.backend == "deepspeed_fused":
        yield (
            f"{place}: offload_optimizer to {zero.offload_optimizer} updates on the CPU, where optimizer.backend deepspeed_fused cannot "
            "run: set optimizer.backend to auto or deepspeed_cpu"
        )
    if zero.stage == 3 or (zero.stage == 2 and lookup(raw, "zero_optimization.reduce_scatter") is not False):
        for key, usual in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if (given := lookup(raw, key)) not in (None, AUTO, usual):
                yield f"{place}: {key} {shown(given)} does not go with ZeRO stage {zero.stage}, which averages gradients itself: remove it"
    if precision == "bf16" and lookup(raw, "bf16.immediate_grad_update") is False:
        yield f'{place}: bf16.immediate_grad_update false fails with accumulation in fp32 (train.precision bf16): write "auto" there'


def _section_problems(section: Any, path: str, known: frozenset[str], place: str) -> Iterator[str]:
    if section is None or (path and section == AUTO):
        return
    if not isinstance(section, Mapping):
        yield f"{place}: {path or 'the file'} is {shown(section)}, which should be a section of keys"
        return
    prefix = f"{path}." if path else ""
    for name, value in section.items():
        key = prefix + name
        if key in REFUSED:
            if not is_harmless(key, value):
                yield f"{place}: {key} is refused, because {REFUSED[key]}"
        elif name not in known:
            yield f"{place}: unknown key {key}{did_you_mean(name, sorted(known))}"


def is_harmless(key: str, value: Any) -> bool:
    """Whether a refused key switches nothing on, so that it may stand and is dropped."""
    if value is None or value == AUTO:
        return True
    if key in HARMLESS:
        return bool(value == HARMLESS[key])
    return value is False or (isinstance(value, Mapping) and value.get("enabled") is False)


def _zero_type_problems(raw: Mapping[str, Any], place: str) -> Iterator[str]:
    stage = lookup(raw, "zero_optimization.stage")
    if stage is not None and (type(stage) is not int or stage not in (0, 1, 2, 3)):
        yield f"{place}: zero_optimization.stage is {shown(stage)}, which should be 0, 1, 2 or 3"
    for what in ("offload_optimizer", "offload_param"):
        device = lookup(raw, f"zero_optimization.{what}.device")
        if device is not None and device not in _DEVICES:
            yield f"{place}: zero_optimization.{what}.device is {shown(device)}, which is none of {', '.join(_DEVICES)}"
    overlap = lookup(raw, "zero_optimization.overlap_comm")
    if overlap not in (None, AUTO) and not isinstance(overlap, bool):
        yield f"{place}: zero_optimization.overlap_comm is {shown(overlap)}, which should be true or false"
