"""The teacher's answers to the whole text, said once and written down."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from largeformer.compression.distillation.answers import AnswerWriter, most_probable
from largeformer.compression.distillation.teacher import Teacher
from largeformer.models.losses import Share
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups


class Text(Protocol):
    """This data rank's micro batches of one global batch after another."""

    @property
    def consumed_samples(self) -> int: ...

    def next(self) -> list[Batch]: ...


@dataclass(frozen=True)
class Dictation:
    """vocab_size: unpadded; chunk: tokens whose logits are in memory at once; device: where the teacher is."""

    teacher: Teacher
    groups: ParallelGroups
    device: torch.device
    vocab_size: int
    chunk: int
    top_k: int

    @torch.no_grad()
    def write(self, text: Text, until: int, held: Container[int], writer: AnswerWriter, interrupted: Callable[[], bool]) -> bool:
        """Write the answers to the samples of `text` up to `until` that are not `held`. False where it was interrupted: what was said is
        written. Collective: a rank that cannot write, or is interrupted, ends them all. Raises OSError where one could not write."""
        problem: OSError | None = None
        stopped = False
        while text.consumed_samples < until and problem is None and not stopped:
            batches = [batch.to(self.device) for batch in text.next()]
            missing = [batch for batch in batches if not all(sample in held for sample in batch.sample_ids)]
            # Within one copy of the model all ranks have the same batches, and miss the same. Pipelines run whole global batches alone:
            # an interleaved one needs as many micro batches as it has stages.
            if missing:
                problem = self._take_down(missing if self.groups.layout.pipeline == 1 else batches, held, writer)
            failed, asked = self.groups.largest_of([problem is not None, interrupted()])
            stopped = bool(asked)
            if failed and problem is None:
                problem = OSError("another rank could not write its part")
        if problem is None:
            try:
                writer.flush()
            except OSError as error:
                problem = error
        if self.groups.largest(problem is not None):
            raise problem or OSError("another rank could not write its part")
        return not stopped

    def _take_down(self, batches: Sequence[Batch], held: Container[int], writer: AnswerWriter) -> OSError | None:
        self.teacher.begin(batches)
        if self.groups.layout.pipeline == 1:
            self.teacher.run(batches)
        problem = None
        for batch in batches if self.groups.is_last_stage else ():
            new = [row for row, sample in enumerate(batch.sample_ids) if sample not in held]
            ids, values, rest = (said[new] for said in self._answer(batch))
            if self.groups.coordinates.tensor == 0 and problem is None and new:
                try:
                    writer.add([batch.sample_ids[row] for row in new], ids, values, rest)
                except OSError as error:
                    problem = error
        return problem

    def _answer(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int64[b, s, k], float32[b, s, k], float32[b, s]."""
        said = self.teacher.answer()
        size = said.weight.shape[0]
        start = self.groups.coordinates.tensor * size
        share = Share(start, size, min(max(self.vocab_size - start, 0), size), self.groups.tensor)
        nothing = said.hidden.new_empty(0)  # a live answer leaves nothing open
        tokens = range(0, len(said.hidden), self.chunk)
        parts = [most_probable(said.log_probabilities(slice(i, i + self.chunk), nothing, share), self.top_k, share) for i in tokens]
        rows, length = batch.tokens.shape
        ids, values, rest = (torch.cat(column).view(length, rows, -1).transpose(0, 1) for column in zip(*parts, strict=True))
        return ids, values, rest.squeeze(-1)
