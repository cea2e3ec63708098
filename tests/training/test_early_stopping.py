"""Early stopping: what counts as an improvement, when it stops, what survives a restart."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from largeformer.config.schema import EarlyStoppingConfig
from largeformer.training.early_stopping import EarlyStopping

# name -> settings, validation values, number of the validation (from 1) that stops, best value
CASES: dict[str, tuple[dict[str, Any], list[float], int | None, float | None]] = {
    "improving": ({"patience": 2}, [3.0, 2.0, 1.0], None, 1.0),
    "patience runs out": ({"patience": 2}, [3.0, 3.1, 3.2], 3, 3.0),
    "an improvement starts the count anew": ({"patience": 2}, [3.0, 3.1, 2.0, 2.1, 2.2], 5, 2.0),
    "less than min_delta is none": ({"patience": 2, "min_delta": 0.5}, [3.0, 2.75, 2.5], 3, 3.0),
    "more than min_delta is one": ({"patience": 2, "min_delta": 0.5}, [3.0, 2.75, 2.25], None, 2.25),
    "exactly min_delta is none": ({"patience": 1, "min_delta": 0.5}, [3.0, 2.5], 2, 3.0),
    "small steps add up to an improvement": ({"patience": 3, "min_delta": 0.5}, [3.0, 2.75, 2.25, 2.25], None, 2.25),
    "before start_step none counts": ({"patience": 2, "start_step": 4}, [3.0, 3.1, 3.2, 3.3, 3.4], 5, 3.0),
    "the best from before start_step counts": ({"patience": 1, "start_step": 3}, [2.0, 3.1, 2.5], 3, 2.0),
    "mode max": ({"patience": 1, "mode": "max"}, [0.5, 0.6, 0.55], 3, 0.6),
    "NaN is no improvement": ({"patience": 2}, [3.0, math.nan, math.nan], 3, 3.0),
    "NaN first does not become the best": ({"patience": 3}, [math.nan, 3.0, 2.0], None, 2.0),
    "infinity is no improvement": ({"patience": 1}, [3.0, -math.inf], 2, 3.0),
    "never finite": ({"patience": 2}, [math.nan, math.nan], 2, None),
}


def first_stop(stopping: EarlyStopping, values: list[float], first: int = 1) -> int | None:
    return next((step for step, value in enumerate(values, first) if stopping.update(value, step)), None)


@pytest.mark.parametrize("name", CASES)
def test_stops_when_it_should(name: str) -> None:
    settings, values, stop, best = CASES[name]
    stopping = EarlyStopping(EarlyStoppingConfig(**settings))
    assert (first_stop(stopping, values), stopping.best) == (stop, best)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_restart_changes_nothing(name: str, cut: int) -> None:
    settings, values, stop, best = CASES[name]
    before, after = (EarlyStopping(EarlyStoppingConfig(**settings)) for _ in range(2))
    first_stop(before, values[:cut])
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    later = first_stop(after, values[cut:], cut + 1)
    if stop is None or stop > cut:
        assert (later, after.best) == (stop, best)


def test_without_a_config_it_never_stops_but_knows_the_best() -> None:
    stopping = EarlyStopping(None)
    assert first_stop(stopping, [1.0] + [2.0] * 100) is None
    assert (stopping.best, stopping.metric) == (1.0, "val_loss")
