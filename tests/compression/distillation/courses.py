"""A teacher and its student's engine on the ranks of a pool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from largeformer.compression.distillation.figures import Figures
from largeformer.compression.distillation.hidden import HiddenMatching, add_projections, layers_here
from largeformer.compression.distillation.loss import DistillationLoss
from largeformer.compression.distillation.teacher import Teacher
from largeformer.config.schema import Recipe
from largeformer.models.gpt import GPT, build_gpt
from largeformer.models.shards import Shard
from largeformer.parallel.batch import Batch
from largeformer.parallel.device import prepare_device
from largeformer.parallel.groups import ParallelGroups
from largeformer.training.engine import StepResult
from tests.distributed import RankContext
from tests.training.engines import Bench, bench_of

PAIRS = ((0, 1), (1, 3))


def teacher_of(student: Recipe, **shape: Any) -> Recipe:
    """Wider and deeper than the student."""
    larger = {"num_layers": 4, "hidden_size": 96, "ffn_hidden_size": 128, **shape}
    return student.model_copy(update={"model": student.model.model_copy(update=larger)})


def perturb(shards: Sequence[Shard], size: float = 0.2) -> None:
    """Away from the start, where everything is small and alike; by names, whatever the layout."""
    for shard in shards:
        noise = size * torch.randn(shard.global_shape, generator=torch.Generator().manual_seed(sum(shard.key.encode())))
        with torch.no_grad():
            shard.of(shard.parameter.data).add_(noise[shard.block])


@dataclass
class Course:
    bench: Bench
    teacher: Teacher
    matching: HiddenMatching | None
    figures: Figures

    def begin(self, batch: Batch) -> list[Batch]:
        """This rank's micro batches of a whole global batch, ready to be trained on."""
        mine = self.bench.share(batch)
        self.figures.begin()
        if self.matching is not None:
            self.matching.scale.value = self.bench.engine.backward_scale(mine)
        self.teacher.begin(mine)
        return mine

    def step(self, batch: Batch, lr: float) -> StepResult:
        return self.bench.engine.train_step(self.begin(batch), lr)


@contextlib.contextmanager
def course_on(ranks: RankContext, recipe: Recipe, teacher: Recipe) -> Iterator[Course]:
    """`recipe.distill` says what is learnt; hidden states of `PAIRS`."""
    made: list[Any] = []

    def alter(chunks: list[GPT], shards: list[Shard], groups: ParallelGroups) -> Sequence[Shard]:
        theirs, their_shards = build_gpt(teacher, groups, prepare_device(0))
        perturb(their_shards)
        pairs = PAIRS if recipe.distill.hidden is not None else ()
        further = add_projections(chunks, pairs, teacher.model.hidden_size, groups, recipe.run.seed)
        here = layers_here(theirs, groups)
        taught = Teacher(theirs, groups, recipe.distill.temperature, {own: here[other] for own, other in pairs if other in here})
        taught.accompany(chunks)
        hidden = ("hidden_loss",) if pairs else ()
        figures = Figures(("kd_loss", "ce_loss", *hidden), groups, hidden if recipe.parallel.sequence_parallel else ())
        if groups.is_last_stage:
            chunks[-1].output_layer.next_loss = DistillationLoss(recipe.distill, taught.answer, figures).next
        matching = None
        if recipe.distill.hidden is not None:
            matching = HiddenMatching(recipe.distill.hidden, pairs, chunks, taught.states, groups, figures)
        made.extend([taught, matching, figures])
        return further

    with bench_of(ranks, recipe, alter=alter) as bench:
        yield Course(bench, *made)
