"""Hidden states of the student that follow the teacher's, layer by layer.

    weight / pairs * sum over pairs and tokens that count of   1 - cos(P x, y)   or   mean over the width of (P x - y)^2

x, y: the output of the student's and of the teacher's layer (Romero et al. 2014, arXiv:1412.6550; Sanh et al. 2019, arXiv:1910.01108,
for the cosine); P: a projection that is trained along, where widths differ. The loss of a layer lies on whatever pipeline stage has the
layer: its gradient joins the one that comes back from the layers above, as Megatron-core does it for a router's loss.
`s` sequence, `b` micro batch, `h` hidden, `t` tensor-parallel degree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.utils import make_viewless_tensor

from largeformer.compression.distillation.figures import Figures
from largeformer.config.distill import HiddenConfig
from largeformer.layout import stage_layers
from largeformer.models.gpt import GPT
from largeformer.models.hf_mapping import BESIDE
from largeformer.models.initialization import generator_for
from largeformer.models.shards import Shard
from largeformer.parallel.groups import ParallelGroups

Pairs = Sequence[tuple[int, int]]
States = Callable[[int], torch.Tensor]


@dataclasses.dataclass
class BackwardScale:
    """What the backward of a step starts from, for each unit of summed loss; set before the step."""

    value: float = 1.0


class Projection(torch.nn.Module):
    """[..., h of the student] -> [..., h of the teacher]."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


def layers_here(chunks: Sequence[GPT], groups: ParallelGroups) -> dict[int, torch.nn.Module]:
    """This rank's Transformer layers by their number in the model."""
    config = chunks[0].config
    ranges = stage_layers(
        config.num_layers,
        groups.layout.pipeline,
        groups.layout.virtual,
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
    )[groups.coordinates.pipeline]
    held = [layer for chunk in chunks for layer in chunk.decoder.layers]
    return dict(zip([number for numbers in ranges for number in numbers], held, strict=True))


def add_projections(student: Sequence[GPT], pairs: Pairs, width: int, groups: ParallelGroups, seed: int) -> list[Shard]:
    """Give each of this rank's chunks the projections of its layers to the teacher's `width`; what they hold, for the engine and its
    checkpoints. None where the widths are the same. They are initialised by their names, whatever the layout."""
    own = student[0].config.hidden_size
    if own == width:
        return []
    here, shards = layers_here(student, groups), []
    first = groups.coordinates.tensor == 0 and groups.coordinates.data == 0
    for number, _ in pairs:
        if number not in here:
            continue
        key = f"{BESIDE}projections.{number}.weight"
        example = next(here[number].parameters())
        whole = torch.empty(width, own, device=example.device).normal_(0.0, own**-0.5, generator=generator_for(seed, key, example.device))
        projection = Projection(whole.to(example.dtype))
        # Under sequence parallelism each rank sees a part of the tokens: gradients are summed, as those of norms are.
        projection.weight.sequence_parallel = student[0].config.sequence_parallel  # type: ignore[attr-defined]
        projection.weight.tensor_model_parallel = False  # type: ignore[attr-defined]
        here[number].distillation = projection
        shape = (width, own)
        shards.append(Shard(key, projection.weight, key, slice(0, width), shape, (0, 0), shape, first))
    return shards


class HiddenMatching:
    """Adds the loss of each of this rank's pairs in the student's forward in training; in evaluation nothing.

    student: its chunks, with projections where they need them. states: the teacher's of the next micro batch, for the student's layer.
    """

    def __init__(
        self, settings: HiddenConfig, pairs: Pairs, student: Sequence[GPT], states: States, groups: ParallelGroups, figures: Figures
    ) -> None:
        self.scale = BackwardScale()
        self._distance, self._weight = _DISTANCES[settings.loss], settings.weight / len(pairs)
        self._states, self._groups, self._figures = states, groups, figures
        self._mask = torch.empty(0)
        for chunk in student:
            chunk.register_forward_pre_hook(self._begin, with_kwargs=True)
        here = layers_here(student, groups)
        for number, _ in pairs:
            if number in here:
                here[number].register_forward_hook(self._hook(number))

    def _begin(self, chunk: GPT, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Which tokens count, [s (or s / t), b], of the micro batch that comes."""
        mask = keywords["loss_mask"].t() if keywords.get("loss_mask") is not None else None
        if chunk.training and mask is not None:
            split = chunk.config.sequence_parallel
            self._mask = mask.chunk(self._groups.layout.tensor)[self._groups.coordinates.tensor] if split else mask

    def _hook(self, number: int) -> Callable[[torch.nn.Module, Any, Any], Any]:
        def match(layer: torch.nn.Module, arguments: Any, output: Any) -> Any:
            if not layer.training:
                return None
            hidden, *others = output
            projection = getattr(layer, "distillation", None)
            own = (hidden if projection is None else projection(hidden)).float()
            distances = self._distance(own, self._states(number).float())
            loss = (distances * self._mask).sum() * self._weight
            self._figures.add(hidden_loss=loss)
            joined = make_viewless_tensor(_WithLoss.apply(hidden, loss, self.scale), requires_grad=True, keep_graph=True)
            return (joined, *others)

        return match


class _WithLoss(torch.autograd.Function):
    """Hidden states as they are; in the backward, `loss` gets its gradient beside theirs."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, loss: torch.Tensor, scale: BackwardScale) -> torch.Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return gradient, torch.full((), ctx.scale.value, dtype=ctx.dtype, device=gradient.device), None


def _cosine(own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return 1.0 - F.cosine_similarity(own, theirs, dim=-1)


def _mean_square(own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (own - theirs).square().mean(dim=-1)


_DISTANCES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"cosine": _cosine, "mse": _mean_square}
