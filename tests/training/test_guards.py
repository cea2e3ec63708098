"""What guards say of numbers that are given to them; and stragglers and replicas on real ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from largeformer.config.guards import GuardsConfig
from largeformer.training.anomalies import LossSpikes, RunStopped, SkippedSteps
from largeformer.training.engine import StepResult
from largeformer.training.replicas import Replicas, digest, disagreement
from largeformer.training.stragglers import RankTime, Stragglers, slow_ranks
from tests.distributed import RankContext, RankPool
from tests.training.engines import PP2, TP2, bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]


def result(loss: float = 2.0, skipped: bool = True, scale: float = 1.0) -> StepResult:
    return StepResult(loss, 100, None if skipped else 1.0, scale, skipped)


def test_anomalies_in_a_row_end_the_run_and_a_good_step_forgives() -> None:
    steps = SkippedSteps(limit=3, least_scale=None)
    for step, one in enumerate([result(math.nan), result(), result(skipped=False), result(), result(math.inf)], start=1):
        event = steps.after(step, one, (8 * step, 8 * step + 8))
        assert (event is None) == (not one.skipped)
        steps.check(step, (8 * step, 8 * step + 8))
    event = steps.after(6, result(), (48, 56))
    assert event == ("nonfinite", {"what": "gradients", "loss": 2.0, "samples": [48, 56], "in_a_row": 3})
    with pytest.raises(RunStopped, match=r"3 steps in a row, up to step 6 .* samples 48 to 55\. No weight changed"):
        steps.check(6, (48, 56))


@pytest.mark.parametrize(
    ("one", "anomaly"),
    [
        pytest.param(result(scale=2.0**10), False, id="the scaler looks for a scale"),
        pytest.param(result(scale=4.0), True, id="the scale is at its least"),
        pytest.param(result(math.nan, scale=2.0**10), True, id="the loss itself"),
    ],
)
def test_in_fp16_an_overflow_is_an_anomaly_at_the_least_scale_only(one: StepResult, anomaly: bool) -> None:
    steps = SkippedSteps(limit=1, least_scale=4.0)
    event = steps.after(1, one, (0, 8))
    assert event is not None and event[0] == ("nonfinite" if anomaly else "skipped")
    if anomaly:
        with pytest.raises(RunStopped):
            steps.check(1, (0, 8))
    else:
        steps.check(1, (0, 8))


def noisy(count: int, mean: float = 3.0, deviation: float = 0.05) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    return [mean + deviation * value for value in torch.randn(count, generator=generator).tolist()]


@pytest.mark.parametrize(
    ("before", "loss", "spike"),
    [
        pytest.param(noisy(50), 3.0 + 10 * 0.05, True, id="10 sigma"),
        pytest.param(noisy(50), 3.0 + 3 * 0.05, False, id="3 sigma"),
        pytest.param(noisy(50), 3.0 - 10 * 0.05, False, id="10 sigma below"),
        pytest.param(noisy(9), 30.0, False, id="too few losses to tell"),
        pytest.param([3.0] * 50, 3.001, False, id="a flat curve has no deviation"),
        pytest.param([3.0] * 50, 3.1, True, id="a jump from a flat curve"),
        pytest.param([10 - 0.1 * i for i in range(50)], 5.1, False, id="a falling curve"),
        pytest.param(noisy(50), math.nan, False, id="not a number"),
    ],
)
def test_a_spike_stands_out_from_the_losses_before_it(before: list[float], loss: float, spike: bool) -> None:
    spikes = LossSpikes(GuardsConfig(spike_z_score=6.0, spike_window=50))
    assert [spikes.score(value) for value in before] == [None] * len(before)
    z = spikes.score(loss)
    assert (z is not None) == spike
    if z is not None and loss < 3.09:
        assert 8 < z < 12


def test_a_spike_hides_no_other_and_a_new_level_is_usual_in_time() -> None:
    spikes = LossSpikes(GuardsConfig(spike_z_score=6.0, spike_window=50))
    for value in noisy(50):
        spikes.score(value)
    assert spikes.score(30.0) is not None and spikes.score(30.0) is not None
    found = [spikes.score(value) for value in noisy(300, mean=6.0)]
    assert found[0] is not None and found[-100:] == [None] * 100


def test_what_was_seen_goes_on_after_a_restart() -> None:
    config = GuardsConfig(spike_z_score=6.0, spike_window=20)
    one, two = LossSpikes(config), LossSpikes(config)
    for value in noisy(30):
        one.score(value)
    two.load_state_dict(one.state_dict())
    assert two.score(4.0) == one.score(4.0) and two.state_dict() == one.state_dict()


@pytest.mark.parametrize(
    ("seconds", "stages", "slow"),
    [
        pytest.param([1.0, 2.0], [0, 0], [1], id="2x of two"),
        pytest.param([1.0, 1.1, 2.0, 0.9], [0, 0, 0, 0], [2], id="2x of four"),
        pytest.param([1.0, 1.4, 1.2], [0, 0, 0], [], id="uneven"),
        pytest.param([1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1], [], id="a stage has more to do"),
        pytest.param([1.0, 1.0, 3.0, 6.0], [0, 0, 1, 1], [3], id="2x of its stage"),
        pytest.param([1.0, 2.0], [0, 1], [1], id="alone in its stage"),
    ],
)
def test_the_slow_rank_is_named(seconds: list[float], stages: list[int], slow: list[int]) -> None:
    times = [RankTime(rank, stage, f"host{rank}", own) for rank, (own, stage) in enumerate(zip(seconds, stages, strict=True))]
    found = slow_ranks(times, ratio=1.5)
    assert [(event["rank"], event["host"]) for event in found] == [(rank, f"host{rank}") for rank in slow]


def slow_ranks_seen(ranks: RankContext, parallel: dict[str, Any], zero: str) -> list[list[dict[str, Any]]]:
    """What is found at the end of two intervals of 5 real steps, in the second of which rank 1 has more to do in every layer."""
    recipe = sgd_recipe(model={"num_layers": 2}, train={"micro_batch_size": 4}, parallel=parallel, deepspeed=f"ds_configs/{zero}.json")
    with bench_of(ranks, recipe) as bench:
        stragglers, found = Stragglers(5, 1.5, bench.groups, bench.engine.chunks), []
        for step in range(1, 11):
            if ranks.rank == 1 and step == 6:
                for layer in bench.engine.chunks[0].decoder.layers:  # type: ignore[union-attr]
                    _busy(layer)
            with stragglers.timing(step):
                bench.engine.train_step(bench.share(global_batch(recipe, seed=step)), 1e-3)
            found.append(stragglers.after(step))
        return [found[4], found[9]]


def _busy(layer: torch.nn.Module) -> None:
    """Makes a layer's forward take several times as long."""

    def work(module: torch.nn.Module, args: Any) -> None:
        began = time.thread_time()
        while time.thread_time() - began < 0.15:
            torch.ones(64, 64) @ torch.ones(64, 64)

    layer.register_forward_pre_hook(work)


@pytest.mark.parametrize(
    ("parallel", "zero"),
    [pytest.param({}, "zero1", id="DP2"), pytest.param({}, "zero3", id="DP2, ZeRO 3"), pytest.param(TP2, "zero1", id="TP2")],
)
def test_a_slow_rank_is_seen_though_all_wait_for_it(ranks: Ranks, parallel: dict[str, Any], zero: str) -> None:
    told = ranks(2).run(slow_ranks_seen, parallel, zero)
    assert told[0] == told[1]
    assert [event["rank"] for event in told[0][1]] == [1]


BITS = [
    pytest.param(torch.float32, 0, id="fp32, lowest bit"),
    pytest.param(torch.float32, 31, id="fp32, sign"),
    pytest.param(torch.bfloat16, 3, id="bf16"),
]


@pytest.mark.parametrize(("dtype", "bit"), BITS)
def test_one_bit_changes_the_digest(dtype: torch.dtype, bit: int) -> None:
    weights = torch.randn(33, 7).to(dtype)
    flipped = flip(weights.clone(), 100, bit)
    assert digest(weights) != digest(flipped) and digest(weights) == digest(weights.clone())


def flip(weights: torch.Tensor, index: int, bit: int) -> torch.Tensor:
    words = weights.view(-1).view(torch.int32 if weights.element_size() == 4 else torch.int16)
    words[index] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(words.dtype)
    return weights


@pytest.mark.parametrize(
    ("digests", "words"),
    [
        pytest.param([5, 5, 5], None, id="alike"),
        pytest.param([5, 6, 5], "w on rank 12 is not as on the other 2", id="one of three"),
        pytest.param([6, 5, 5, 5, 7], "w on ranks 10, 14 are not as on the other 3", id="two of five"),
        pytest.param([5, 6], "w is not the same on ranks 10, 12, and there is no majority", id="one of two"),
    ],
)
def test_a_majority_tells_which_copy_is_wrong(digests: list[int], words: str | None) -> None:
    told = disagreement("w", digests, [10, 12, 13, 15, 14][: len(digests)] if len(digests) < 5 else [10, 11, 12, 13, 14])
    assert told is None if words is None else told is not None and told.startswith(words)


def check_replicas(ranks: RankContext, parallel: dict[str, Any], zero: str, broken: int) -> list[str | None]:
    """What every rank is told at steps 1 (no check), 2 (sound) and 4 (a bit of `broken`'s weights was flipped before)."""
    recipe = sgd_recipe(train={"micro_batch_size": 1, "global_batch_size": 12}, parallel=parallel, deepspeed=f"ds_configs/{zero}.json")
    with bench_of(ranks, recipe) as bench:
        replicas = Replicas(2, bench.engine.chunks, bench.groups)
        told: list[str | None] = []
        for step in (1, 2, 3, 4):
            bench.engine.train_step(bench.share(global_batch(recipe, seed=step)), 1e-3)
            if step == 4 and ranks.rank == broken:
                whole = [p for p in bench.engine.chunks[0].parameters() if getattr(p, "ds_numel", p.numel()) == p.numel()]
                flip(whole[0].data, 3, 5)
            try:
                replicas.check(step)
                told.append(None)
            except RunStopped as error:
                told.append(str(error))
        return told


@pytest.mark.parametrize(
    ("world_size", "parallel", "zero", "broken", "words"),
    [
        pytest.param(2, {}, "zero1", 1, "not the same on ranks 0, 1", id="DP2"),
        pytest.param(3, {}, "zero0", 1, "on rank 1 is not as on the other 2", id="DP3"),
        pytest.param(3, {}, "zero3", 2, "on rank 2 is not as on the other 2", id="DP3, ZeRO 3, a norm"),
        pytest.param(2, TP2, "zero1", 1, None, id="TP2 has no copies"),
        pytest.param(4, PP2, "zero1", 3, "not the same on ranks 2, 3", id="PP2 x DP2, second stage", marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_is_named_on_every_rank(
    ranks: Ranks, world_size: int, parallel: dict[str, Any], zero: str, broken: int, words: str | None
) -> None:
    for told in ranks(world_size).run(check_replicas, parallel, zero, broken):
        assert told[:3] == [None, None, None]
        assert told[3] is None if words is None else told[3] is not None and words in told[3]
