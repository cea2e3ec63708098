"""DeepSpeed's engine around Megatron-core's modules: the only user of `deepspeed.initialize`.

DeepSpeed owns the optimizer, ZeRO, loss scaling and the step; without a pipeline its engine also runs forward and backward,
with one Megatron-core's schedules drive the modules and DeepSpeed is told when the accumulation is complete.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from largeformer.config.deepspeed import ZeroConfig
from largeformer.config.schema import Recipe
from largeformer.models.shards import Shard
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups
from largeformer.parallel.pipeline import evaluate_loss, forward_loss, run_pipeline
from largeformer.training.gradients import clip_gradients, hook_penalties, hook_sequence_parallel, sum_tied_gradients
from largeformer.training.optimizer import build_optimizer
from largeformer.training.soundness import Refusal, UncountedGradients, let_refuse
from largeformer.training.state import EngineState
from largeformer.training.zero import forget_models, partitioned_as_they_are

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. `loss`: nats per valid token of the whole global batch, alike on every rank. `grad_norm`: before
    clipping, unscaled; None where the step was skipped. `skipped`: the loss or a gradient of some rank was not finite, and on no
    rank did a weight or a moment change."""

    loss: float
    tokens: int
    grad_norm: float | None
    loss_scale: float
    skipped: bool


@dataclass(frozen=True)
class Accumulated:
    """What a forward and backward over one global batch left behind, beside the gradients; the fields are `StepResult`'s."""

    loss: float
    tokens: int
    loss_scale: float


class Engine:
    """Trains the chunks that it was given."""

    def __init__(
        self, wrapped: Any, chunks: Sequence[torch.nn.Module], shards: Sequence[Shard], groups: ParallelGroups, penalty: PenaltyScale
    ) -> None:
        self.wrapped = wrapped
        self.state = EngineState(wrapped, shards, groups)
        self.chunks = list(chunks)
        self.groups = groups
        self._penalty = penalty
        self._uncounted = UncountedGradients(chunks, groups)
        self._refusal = Refusal()
        let_refuse(wrapped.optimizer, self._refusal)
        self._zero_stage = wrapped.zero_optimization_stage()
        self._pipelined = groups.layout.pipeline > 1
        # One data-parallel rank has nothing to sum, and DeepSpeed would still copy all gradients into a bucket and back. Its ZeRO
        # optimizers are asked all the same: they sort gradients into partitions by the way.
        partitions = self._zero_stage > 1 or hasattr(wrapped.optimizer, "reduce_gradients")
        self._reduces = partitions or groups.layout.data > 1
        wrapped.enable_backward_allreduce = self._reduces and not self._pipelined
        wrapped.pipeline_parallelism = self._pipelined

    @property
    def loss_scale(self) -> float:
        """The scale that the next backward uses; 1 outside fp16."""
        return float(getattr(self.wrapped.optimizer, "cur_scale", 1.0)) if self.wrapped.fp16_enabled() else 1.0

    def scaler_state(self) -> dict[str, float | int]:
        """The loss scaler's numbers, for a checkpoint; empty outside fp16."""
        if not self.wrapped.fp16_enabled():
            return {}
        scaler = self.wrapped.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}

    def restore_scaler(self, state: dict[str, float | int]) -> None:
        """Nothing outside fp16, and from or into a scale that does not move: a checkpoint may go on in another precision."""
        if self.wrapped.fp16_enabled() and self.wrapped.optimizer.loss_scaler.dynamic and "cur_iter" in state:
            for name, value in state.items():
                setattr(self.wrapped.optimizer.loss_scaler, name, value)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Forward, backward and step over this data rank's micro batches of one global batch, at learning rate `lr`."""
        return self.step(self.accumulate(batches), lr)

    def accumulate(self, batches: Sequence[Batch]) -> Accumulated:
        """Forward and backward over all micro batches; the gradients are summed, reduced and wait for `step`."""
        for chunk in self.chunks:
            chunk.train()
        tokens = self._valid_tokens(batches)
        scale = self._scale(tokens)
        loss_scale = self.loss_scale
        self._penalty.value = loss_scale / len(batches)
        loss_sum = self._pipeline_pass(batches, scale * loss_scale) if self._pipelined else self._plain_pass(batches, scale)
        dist.all_reduce(loss_sum, group=self.groups.data)
        return Accumulated(loss=loss_sum.item() / max(tokens, 1), tokens=tokens, loss_scale=loss_scale)

    def backward_scale(self, batches: Sequence[Batch]) -> float:
        """What the backward over these micro batches multiplies each summed loss by: what is added to gradients elsewhere must be too.
        Collective."""
        return self._scale(self._valid_tokens(batches)) * self.loss_scale

    def step(self, accumulated: Accumulated, lr: float) -> StepResult:
        """Clip and step. The step is skipped on every rank where the loss or a gradient of any rank is not finite."""
        for group in self.wrapped.optimizer.param_groups:
            group["lr"] = lr
        norm = self._norm_without_zero() if self._zero_stage == 0 else None
        self._refusal.refused = not self._sound(accumulated.loss, norm)
        self.wrapped.step()
        skipped = not self.wrapped.was_step_applied()
        if self.wrapped.fp16_enabled():
            self.wrapped.optimizer.loss_scaler.update_scale(skipped)
        if self._zero_stage > 0 and not skipped:
            norm = float(self.wrapped.get_global_grad_norm())
        return StepResult(accumulated.loss, accumulated.tokens, None if skipped else norm, accumulated.loss_scale, skipped)

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """The summed loss in nats, and the number of valid tokens, over the data-parallel ranks' micro batches."""
        for chunk in self.chunks:
            chunk.eval()
        loss_sum = evaluate_loss(self.chunks, batches, self.groups)
        dist.all_reduce(loss_sum, group=self.groups.data)
        return loss_sum.item(), self._valid_tokens(batches)

    def close(self) -> None:
        """Let go of what DeepSpeed holds, so that the model, and process groups that hang on it, can be freed."""
        self.wrapped.destroy()
        forget_models()

    def _plain_pass(self, batches: Sequence[Batch], scale: float) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for number, batch in enumerate(batches, start=1):
            self.wrapped.set_gradient_accumulation_boundary(number == len(batches))
            loss = forward_loss(self.wrapped, batch)
            self.wrapped.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
        return total

    def _pipeline_pass(self, batches: Sequence[Batch], scale: float) -> torch.Tensor:
        self.wrapped.set_gradient_accumulation_boundary(False)
        losses = run_pipeline(self.chunks, batches, self.groups, scale)
        self.wrapped.set_gradient_accumulation_boundary(True)
        sum_tied_gradients(self.chunks, self.groups)
        if self._reduces:
            self.wrapped.allreduce_gradients()
        total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for loss in losses:
            total += loss
        return self.groups.from_last_stage(total)

    def _scale(self, tokens: int) -> float:
        # DeepSpeed averages gradients over data-parallel ranks; the loss is a mean over all valid tokens of the global batch.
        return self.groups.layout.data / max(tokens, 1)

    def _norm_without_zero(self) -> float:
        # DeepSpeed's own clipping counts the second copy of a tied embedding and reports no norm.
        return clip_gradients(self.chunks, self.wrapped.gradient_clipping(), self.groups)

    def _sound(self, loss: float, norm: float | None) -> bool:
        """Whether what DeepSpeed's norm does not tell is finite, on any rank. Its own norm it judges itself, alike on all ranks."""
        finite = self._uncounted.finite()  # asked in any case: it forgets what it has seen
        sound = finite and math.isfinite(loss) and (norm is None or math.isfinite(norm))
        # Without tensor parallelism every gradient counts in the norm, and loss and norm are sums over ranks already.
        return sound if self.groups.layout.tensor == 1 else self.groups.largest(not sound) == 0

    def _valid_tokens(self, batches: Sequence[Batch]) -> int:
        counted = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
        dist.all_reduce(counted, group=self.groups.data)
        return round(counted.item())


@dataclass
class PenaltyScale:
    """What one micro batch's backward multiplies the L1 and L2 gradient by; set before each step."""

    value: float = 1.0


def build_engine(
    recipe: Recipe,
    chunks: Sequence[torch.nn.Module],
    shards: Sequence[Shard],
    groups: ParallelGroups,
    deepspeed_config: dict[str, Any],
) -> Engine:
    """Wrap this rank's chunks, described by `shards`. `deepspeed_config` is resolved: it holds no "auto"."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings repeat what the recipe says, once a rank
    # On CPUs DeepSpeed would compile a shared-memory all-reduce of its own at the start. Its ranks wait by spinning, and each
    # leaves 69 MB in /dev/shm for good (0.19.8). gloo does without.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    penalty = PenaltyScale()
    hook_sequence_parallel(chunks, groups)
    hook_penalties(chunks, recipe.optimizer, penalty)
    if recipe.train.compile:
        compile_layers(chunks)
    module = chunks[0] if len(chunks) == 1 else torch.nn.ModuleList(chunks)
    offloaded = ZeroConfig.of(deepspeed_config).offload_optimizer != "none"
    optimizer = build_optimizer(recipe.optimizer, module.parameters(), offloaded=offloaded)
    # DeepSpeed prints its memory at every stage of this, whatever the log level.
    with contextlib.redirect_stdout(io.StringIO()), partitioned_as_they_are():
        wrapped, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config, mpu=groups.mpu(), dist_init_required=False
        )
    if wrapped.zero_optimization_stage() == 0:
        wrapped.clip_fp32_gradients = lambda: None  # clipped before the step, see `_norm_without_zero`
    if wrapped.fp16_enabled():
        # DeepSpeed moves the loss scale before it unscales, so that each step that doubles it would halve the gradients
        # (0.19.8, both of its ZeRO optimizers; DeepSpeed#8588). `Engine.step` moves it afterwards.
        wrapped.optimizer._update_scale = lambda has_overflow=False: None
        # It would end the run at the first step that is skipped at the smallest scale; how many may be, the guards say.
        wrapped.optimizer.loss_scaler.raise_error_at_min_scale = False
    return Engine(wrapped, chunks, shards, groups, penalty)


def section_problems(deepspeed_config: dict[str, Any], place: str) -> list[str]:
    """What DeepSpeed's own schemas refuse in the sections of a resolved config: values of a wrong type. `place` names the file."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    schemas = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }
    problems = []
    for section, schema in schemas.items():
        try:
            schema(**deepspeed_config.get(section, {}))
        except ValidationError as error:
            for wrong in error.errors():
                key = ".".join(map(str, (section, *wrong["loc"])))
                problems.append(f"{place}: {key} is {wrong['input']!r}, which DeepSpeed refuses: {wrong['msg']}")
    return problems


def compile_layers(chunks: Sequence[torch.nn.Module]) -> None:
    """`torch.compile` each Transformer layer in place. Layers are alike, so one compilation serves all."""
    from megatron.core.tensor_parallel import layers

    # The library warns once, through an attribute of the function, which a compiled layer cannot set.
    layers.linear_with_grad_accumulation_and_async_allreduce.warned = True
    for chunk in chunks:
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            layer.compile()
