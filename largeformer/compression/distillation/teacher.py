"""The teacher beside its student: frozen, cut like it, and one step ahead.

Without a pipeline the teacher runs on each micro batch right before the student does, and one micro batch's states are in memory. With one,
the micro batches of a global batch go through the teacher's stages, by the same schedule, before they go through the student's; the
states that the student will ask for wait on the stage where it will: the last hidden states of the whole global batch on the last.
`s` sequence, `b` micro batch, `h` hidden of the teacher, `t` tensor-parallel degree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from largeformer.compression.distillation.loss import LiveAnswer
from largeformer.models.gpt import GPT
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups
from largeformer.parallel.pipeline import forward_loss, run_pipeline

_LAST = -1


class Teacher:
    """chunks: this rank's, with their weights, which are frozen here; they lose their heads: only `answer` knows what they say.

    temperature: of its answers. keeps: by a student's layer, the module whose output is kept for it.
    """

    def __init__(
        self, chunks: Sequence[GPT], groups: ParallelGroups, temperature: float, keeps: Mapping[int, torch.nn.Module] | None = None
    ) -> None:
        self._chunks, self._groups, self._temperature = chunks, groups, temperature
        self._waiting: dict[int, deque[torch.Tensor]] = {}
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        if groups.is_last_stage:
            last = chunks[-1]
            tied = last.share_embeddings_and_output_weights
            self._weight = last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
            self._sequence_parallel = last.config.sequence_parallel
            last.output_layer = _Listening(self._weight, lambda hidden: self._keep(_LAST, hidden))  # type: ignore[assignment]
        for layer, module in (keeps or {}).items():
            module.register_forward_hook(self._keeper(layer))

    def accompany(self, student: Sequence[GPT]) -> None:
        """Run before each forward of the student in training; with a pipeline `run` does it, once for all micro batches."""
        if self._groups.layout.pipeline == 1:
            student[0].register_forward_pre_hook(self._before, with_kwargs=True)

    def begin(self, batches: Sequence[Batch]) -> None:
        """The next step trains on `batches`, which are on this rank's device. Collective where there is a pipeline."""
        self._waiting.clear()
        if self._groups.layout.pipeline > 1:
            self.run(batches)

    @torch.no_grad()
    def run(self, batches: Sequence[Batch]) -> None:
        """Keep the states of all `batches`."""
        if self._groups.layout.pipeline > 1:
            run_pipeline(self._chunks, batches, self._groups, scale=1.0, forward_only=True)
            return
        for batch in batches:
            forward_loss(self._chunks[0], batch)

    def answer(self) -> LiveAnswer:
        """What it says of the next micro batch; on the last pipeline stage."""
        hidden = self.states(_LAST)
        if self._sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self._groups.tensor)
        return LiveAnswer(hidden.flatten(0, 1), self._weight.detach(), self._temperature)

    def states(self, layer: int) -> torch.Tensor:
        """The next micro batch's hidden states, [s (or s / t), b, h], that were kept for the student's `layer`."""
        return self._waiting[layer].popleft()

    def _keep(self, layer: int, hidden: torch.Tensor) -> None:
        self._waiting.setdefault(layer, deque()).append(hidden.detach())

    def _keeper(self, layer: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        return lambda module, arguments, output: self._keep(layer, output[0] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def _before(self, student: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if student.training:
            self._chunks[0](*arguments, **keywords)


class _Listening(torch.nn.Module):
    """Stands where the output projection was: hands on the last hidden states, and computes nothing."""

    def __init__(self, weight: torch.Tensor, heard: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.weight, self._heard = weight, heard

    def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        self._heard(hidden)
        return hidden.new_zeros((), dtype=torch.float32)
