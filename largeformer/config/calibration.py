"""The key `calibration` of the sections `prune` and `quantize`."""

from __future__ import annotations

from largeformer.config.section import PositiveInt, Section


class CalibrationConfig(Section):
    """The text that statistics are taken from: `samples` windows of the model's sequence length, packed, spread evenly over it.

    `text`: a file of text, or another run's prepare folder; null: the training split of the run's own data.
    """

    samples: PositiveInt = 128
    text: str | None = None
