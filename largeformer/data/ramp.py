"""The global batch size, which may ramp up: from `start` by `increment`, spread evenly over `samples` samples (as in Megatron)."""

from __future__ import annotations

from largeformer.config.schema import TrainConfig


class BatchSizes:
    """A pure function of the samples consumed, so that resuming needs no state."""

    def __init__(self, train: TrainConfig) -> None:
        self._final, self._ramp = train.global_batch_size, train.rampup_batch_size

    def at(self, consumed_samples: int) -> int:
        """Size of the global batch that follows `consumed_samples` samples."""
        ramp = self._ramp
        if ramp is None or ramp.start >= self._final or consumed_samples >= ramp.samples:
            return self._final
        steps = (self._final - ramp.start) // ramp.increment
        return ramp.start + ramp.increment * (consumed_samples * steps // ramp.samples)

    def samples_after(self, iterations: int, consumed: int = 0) -> int:
        """Samples that have been consumed once `iterations` global batches have followed `consumed` ones."""
        for done in range(iterations):
            if self.at(consumed) == self._final:
                return consumed + (iterations - done) * self._final
            consumed += self.at(consumed)
        return consumed
