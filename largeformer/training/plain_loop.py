"""The training step without DeepSpeed, as it is written by hand: what `bench` compares the engine with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from largeformer.config.schema import OptimizerConfig
from largeformer.parallel.batch import Batch
from largeformer.training.optimizer import build_optimizer


class PlainLoop:
    """Forward, backward, clip and step of one whole model on one device, by one PyTorch optimizer with fused kernels.

    `loss_of(batch)` is the summed loss of a micro batch, float32[]. With `masters` the optimizer steps fp32 copies of the
    parameters by gradients that are accumulated in fp32, as DeepSpeed does for bf16; without, the parameters themselves.
    """

    def __init__(
        self,
        loss_of: Callable[[Batch], torch.Tensor],
        parameters: Iterable[torch.nn.Parameter],
        config: OptimizerConfig,
        masters: bool,
    ) -> None:
        self._loss_of = loss_of
        self._parameters = list(parameters)
        self._stepped = [torch.nn.Parameter(p.detach().float().clone()) for p in self._parameters] if masters else self._parameters
        self._masters = masters
        self._clip = config.clip_grad
        self._optimizer = build_optimizer(config.model_copy(update={"backend": "torch_fused"}), self._stepped, offloaded=False)

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step over all micro batches. Returns: float32[], nats per valid token."""
        tokens = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
        total = torch.zeros_like(tokens)
        for batch in batches:
            loss = self._loss_of(batch) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            if self._masters:
                self._accumulate()
        if self._clip > 0.0:
            torch.nn.utils.clip_grad_norm_(self._stepped, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._masters:
            with torch.no_grad():
                for parameter, master in zip(self._parameters, self._stepped, strict=True):
                    parameter.copy_(master)
        return total

    def _accumulate(self) -> None:
        for parameter, master in zip(self._parameters, self._stepped, strict=True):
            assert parameter.grad is not None, "every parameter takes part in the loss"
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None
