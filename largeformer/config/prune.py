"""The recipe's section `prune`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from largeformer.config.calibration import CalibrationConfig
from largeformer.config.chain import TrainedSection
from largeformer.config.section import Positive, PositiveInt, Section

if TYPE_CHECKING:
    from largeformer.config.schema import TrainConfig

WIDTH_AXES = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_STRUCTURED, _SPARSE = ("width", "depth"), ("magnitude", "wanda", "sparsegpt")
_DEFAULT_TARGET, _DEFAULT_SPARSITY = 0.85, 0.5

Share = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]


def _not_base_sixty(value: Any) -> Any:
    """YAML 1.1 reads an unquoted 2:4 as 2 x 60 + 4."""
    return "{}:{}".format(*divmod(value, 60)) if isinstance(value, int) and not isinstance(value, bool) else value


class ScheduleConfig(Section):
    """Sparsity grows over the steps `start` to `end` of a training, every `interval` steps, along a cubic (Zhu and Gupta 2017,
    arXiv:1710.01878); the zeros hold from there to the end."""

    start: Annotated[int, Field(ge=0)] = 0
    end: PositiveInt
    interval: PositiveInt = 10


class PruneConfig(TrainedSection):
    """Two kinds of pruning. `width` and `depth` leave a smaller model, the others zeros in one of the same shape.

    Smaller: `target_parameters`, a share below 1 or a number, embeddings included, which `width` reaches by the `axes` that have no size
    of their own here, `depth` by layers; or sizes. Sizes that are searched are multiples of `multiple_of`. `importance`: from
    `activation`s on the calibration text (of layers: what they change), `weight` norms, or, of layers, `ablation`: the loss without them.
    `reconstruct`: where `width` reads that text, weights behind channels and heads that go are fitted to what they gave.

    Zeros: a share `sparsity` of each matrix of the linear layers, or N:M by `pattern` (`2:4`: at most 2 of each 4 inputs stay); by
    `magnitude`, also a share of all matrices together (`scope: global`) or all below `threshold`. `schedule`: by magnitude, little by
    little in a training, for which `train` and `optimizer` hold what differs from the recipe's sections.
    """

    method: Literal["width", "depth", "magnitude", "wanda", "sparsegpt"] = "width"
    target_parameters: Positive | None = None
    axes: Annotated[tuple[Literal["hidden_size", "ffn_hidden_size", "num_attention_heads"], ...], Field(min_length=1)] = (
        "hidden_size",
        "ffn_hidden_size",
    )
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    ffn_hidden_size: PositiveInt | None = None
    num_attention_heads: PositiveInt | None = None
    num_query_groups: PositiveInt | None = None
    multiple_of: PositiveInt = 8
    importance: Literal["activation", "weight", "ablation"] = "activation"
    reconstruct: bool = True
    sparsity: Share | None = None
    pattern: Annotated[str | None, BeforeValidator(_not_base_sixty)] = None
    scope: Literal["local", "global"] = "local"
    threshold: Positive | None = None
    schedule: ScheduleConfig | None = None
    block_size: PositiveInt = 128
    dampening: Positive = 0.01
    calibration: CalibrationConfig = CalibrationConfig()

    @property
    def trains(self) -> bool:
        return self.schedule is not None

    @property
    def structured(self) -> bool:
        """Whether the result is smaller, rather than sparse."""
        return self.method in _STRUCTURED

    @property
    def calibrates(self) -> bool:
        """Whether the calibration text is read."""
        return self.importance != "weight" if self.structured else self.method != "magnitude"

    @property
    def reconstructs(self) -> bool:
        """Whether weights that stay are fitted, which needs the text that importance by activations reads."""
        return self.reconstruct and self.method == "width" and self.importance == "activation"

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are given."""
        return {axis: size for axis in ("num_layers", *WIDTH_AXES) if (size := getattr(self, axis)) is not None}

    @property
    def target(self) -> float | None:
        """What `target_parameters` asks for: a share or a number; None where sizes say all."""
        return self.target_parameters or (None if self.sizes else _DEFAULT_TARGET)

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """`pattern` as numbers: at most N of each M."""
        if self.pattern is None:
            return None
        kept, of = self.pattern.split(":")
        return int(kept), int(of)

    @property
    def share(self) -> float:
        """The share of zeros that is asked for."""
        if self.kept_of is not None:
            return 1 - self.kept_of[0] / self.kept_of[1]
        return self.sparsity or _DEFAULT_SPARSITY


def prune_problems(prune: PruneConfig, train: TrainConfig) -> Iterator[str]:
    """What does not go together. `train`: the recipe's section, of which the stage may have keys otherwise."""
    own = prune.train.get("train_iters")
    train_iters = own if isinstance(own, int) else train.train_iters
    yield from _foreign_keys(prune)
    target = prune.target_parameters
    if target is not None and target >= 1 and target != int(target):
        yield f"prune.target_parameters {target} is neither a share below 1 nor a whole number of parameters"
    if prune.method == "width" and prune.importance == "ablation":
        yield "prune.importance ablation measures layers, and prune.method is width: use activation or weight, or prune.method depth"
    if prune.pattern is not None:
        found = re.fullmatch(r"(\d+):(\d+)", prune.pattern)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            yield f"prune.pattern {prune.pattern} is no N:M with 0 < N < M, such as 2:4 (at most 2 of each 4 weights in a row stay)"
    amounts = [name for name in ("sparsity", "pattern", "threshold") if getattr(prune, name) is not None]
    if len(amounts) > 1:
        yield f"prune.{' and prune.'.join(amounts)} each say how much becomes 0: give one of them"
    schedule = prune.schedule
    if schedule is not None and not schedule.start < schedule.end < train_iters:
        yield (
            f"prune.schedule goes from step {schedule.start} to {schedule.end} of {train_iters}: it must end after it starts, and before "
            "prune.train.train_iters"
        )
    if schedule is not None and prune.train.get("early_stopping", train.early_stopping) is not None:
        yield (
            "prune.schedule goes with no train.early_stopping, which would end it before all zeros are there, since the loss rises with "
            "them: give prune.train.early_stopping: null"
        )
    if schedule is not None and (prune.pattern or prune.threshold):
        yield "prune.schedule lets a share grow: leave out prune.pattern and prune.threshold, or prune at once, without a schedule"


_BELONG = {
    "target_parameters": _STRUCTURED,
    "num_layers": ("depth",),
    **dict.fromkeys(WIDTH_AXES, ("width",)),
    "sparsity": _SPARSE,
    "pattern": _SPARSE,
    "threshold": ("magnitude",),
    "schedule": ("magnitude",),
}


def _foreign_keys(prune: PruneConfig) -> Iterator[str]:
    """Keys that the method does not read: whoever sets them expects something that will not come."""
    for key, methods in _BELONG.items():
        value = getattr(prune, key)
        if value is not None and prune.method not in methods:
            shown = value if not isinstance(value, Section) else "given"
            yield f"prune.{key} is {shown}, which prune.method {prune.method} does not read: it belongs to {' and '.join(methods)}"
    if prune.scope == "global" and (prune.method != "magnitude" or prune.pattern or prune.threshold):
        yield "prune.scope global ranks all weights by magnitude: it needs prune.method magnitude and prune.sparsity, or set it to local"
