"""Each order yields the distribution that it claims (Pearson's chi-square), and is a function of seed and place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from largeformer.data.sampling import (
    ClassBalanced,
    Curriculum,
    EasiestFirst,
    LossWeighted,
    Order,
    ShuffledEpochs,
    Uniform,
    competence,
    temperature_shares,
)
from largeformer.errors import BadInputError

SIZE = 50
DIFFICULTY = np.random.default_rng(8).random(SIZE)
LABELS = np.repeat([0, 1, 2, 5], [30, 13, 6, 1])


def chi_square_p(observed: Sequence[int] | np.ndarray, expected: Sequence[float] | np.ndarray) -> float:
    """The probability of a deviation as large as this, by Wilson and Hilferty's normal approximation of chi-square (1931)."""
    seen, wanted = np.asarray(observed, dtype=float), np.asarray(expected, dtype=float)
    assert wanted.min() >= 5, "Pearson's test wants five of each"
    freedom = len(wanted) - 1
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def test_the_measure_itself() -> None:
    """Against values of a table: 18.31 and 29.59 are the 5 % and 0.1 % points for 10 degrees of freedom."""
    for statistic, p in ((18.31, 0.05), (29.59, 0.001)):
        wanted = np.full(11, 1000.0)
        seen = wanted + math.sqrt(statistic * 1000 / 2) * np.array([1, -1, *[0] * 9])
        assert chi_square_p(seen, wanted) == pytest.approx(p, rel=0.1)


ORDERS: dict[str, Callable[[int], Order]] = {
    "shuffled epochs": lambda seed: ShuffledEpochs(SIZE, (seed,)),
    "curriculum, linear": lambda seed: Curriculum(DIFFICULTY, competence("linear", 0.1, 5), 4000, (seed,)),
    "curriculum, root": lambda seed: Curriculum(DIFFICULTY, competence("root", 0.1, 5), 4000, (seed,)),
    "curriculum, step": lambda seed: Curriculum(DIFFICULTY, competence("step", 0.2, 4), 4000, (seed,)),
    "class balanced": lambda seed: ClassBalanced(LABELS, (seed,)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_depends_on_seed_and_place_alone(name: str) -> None:
    straight = [ORDERS[name](3)(place) for place in range(300)]
    order = ORDERS[name](3)
    assert [order(place) for place in (*range(299, -1, -1), *range(300))][300:] == straight, "whatever was asked for before"
    assert [ORDERS[name](4)(place) for place in range(300)] != straight
    assert set(straight) <= set(range(SIZE))


@pytest.mark.parametrize("name", ORDERS)
def test_two_data_parallel_ranks_draw_what_one_draws(name: str) -> None:
    """Ranks take turns over the places of one order: together they hold it whole."""
    whole = [ORDERS[name](3)(place) for place in range(200)]
    halves = [[ORDERS[name](3)(place) for place in range(rank, 200, 2)] for rank in range(2)]
    assert [halves[place % 2][place // 2] for place in range(200)] == whole


def test_an_epoch_is_everything_once() -> None:
    order = ShuffledEpochs(SIZE, (1,))
    epochs = [[order(epoch * SIZE + i) for i in range(SIZE)] for epoch in range(40)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 40


def test_where_a_sample_stands_in_its_epoch_is_uniform() -> None:
    order = ShuffledEpochs(10, (1,))
    firsts = np.bincount([order(10 * epoch) for epoch in range(2000)], minlength=10)
    assert chi_square_p(firsts, np.full(10, 200)) > 1e-3


def test_uniform_numbers_are_uniform() -> None:
    uniform = Uniform((5,))
    cells = np.bincount([int(uniform(place) * 20) for place in range(10_000)], minlength=20)
    assert chi_square_p(cells, np.full(20, 500)) > 1e-3


def by_hand(pacing: str, t: float) -> float:
    """Platanios et al. 2019: linear c0 + (1 - c0) t, root sqrt(t (1 - c0^2) + c0^2); with c0 = 0.1, and four stairs for step."""
    return {"linear": 0.1 + 0.9 * t, "root": math.sqrt(0.99 * t + 0.01), "step": [0.1, 0.4, 0.7, 1.0][min(int(4 * t), 3)]}[pacing]


@pytest.mark.parametrize("pacing", ["linear", "root", "step"])
def test_competence(pacing: str) -> None:
    share = competence(pacing, 0.1, 4)
    assert [share(t / 100) for t in range(100)] == pytest.approx([by_hand(pacing, t / 100) for t in range(100)])


@pytest.mark.parametrize("pacing", ["linear", "root", "step"])
def test_a_curriculum_draws_uniformly_from_the_easiest(pacing: str) -> None:
    span, order = 20_000, Curriculum(DIFFICULTY, competence(pacing, 0.2, 4), 20_000, (1,))
    ranks = np.argsort(np.argsort(DIFFICULTY))
    drawn = np.array([ranks[order(place)] for place in range(span)])
    pools = np.array([order.pool(place) for place in range(span)])
    assert (drawn < pools).all(), "easy first, and not shuffled away"
    assert (np.diff(pools) >= 0).all() and pools[0] == 10 and pools[-1] >= SIZE - 1
    # A pool of m gives each of its samples 1 / m; samples of one difficulty rank are expected where the pool has reached them.
    expected = np.array([(1.0 / pools[pools > rank]).sum() for rank in range(SIZE)])
    enough = expected >= 5
    observed = np.bincount(drawn, minlength=SIZE)
    assert chi_square_p(observed[enough], expected[enough]) > 1e-3
    assert chi_square_p(np.bincount(drawn, minlength=SIZE), np.full(SIZE, span / SIZE)) < 1e-6, "it is not plain uniform"
    thirds = [part.mean() for part in np.array_split(drawn, 3)]
    assert thirds == sorted(thirds)


def test_after_its_span_a_curriculum_is_shuffled_epochs() -> None:
    order = Curriculum(DIFFICULTY, competence("root", 0.1, 5), 77, (1,))
    assert sorted(order(77 + i) for i in range(SIZE)) == list(range(SIZE))


def test_sorted_is_each_epoch_easiest_first() -> None:
    order = EasiestFirst(np.argsort(DIFFICULTY, kind="stable"))
    for epoch in range(2):
        values = [DIFFICULTY[order(epoch * SIZE + i)] for i in range(SIZE)]
        assert values == sorted(DIFFICULTY)


def test_classes_are_balanced_and_each_passes_through_its_samples() -> None:
    order = ClassBalanced(LABELS, (1,))
    drawn = [order(place) for place in range(4 * 300)]
    labels = LABELS[drawn]
    assert [int((labels == one).sum()) for one in (0, 1, 2, 5)] == [300] * 4
    assert all(sorted(labels[i : i + 4].tolist()) == [0, 1, 2, 5] for i in range(0, 1200, 4))
    firsts = np.bincount(np.searchsorted([0, 1, 2, 5], labels[::4]), minlength=4)
    assert chi_square_p(firsts, np.full(4, 75)) > 1e-3, "who comes first in a round is by chance"
    own = [sample for sample in drawn if LABELS[sample] == 0]
    assert all(sorted(own[i : i + 30]) == list(range(30)) for i in range(0, 300, 30))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, [0.9, 0.1]), (2.0, [0.75, 0.25]), (1e9, [0.5, 0.5])])
def test_temperature(temperature: float, expected: list[float]) -> None:
    assert temperature_shares([900, 100], [1.0, 1.0], temperature) == pytest.approx(expected, abs=1e-6)
    weighted = temperature_shares([900, 100], [1.0, 3.0], temperature)
    assert weighted[1] / weighted[0] == pytest.approx(3 * expected[1] / expected[0], rel=1e-6)


def weighted(interval: int = 10, **options: float) -> LossWeighted:
    return LossWeighted([1.0, 1.0, 2.0], (7,), **{"power": 1.0, "decay": 0.9, "floor": 0.1, **options}, interval=interval)  # type: ignore[arg-type]


LOSSES = np.array([4.0, 1.0, 2.0])


def test_losses_of_other_sources_are_refused() -> None:
    order = LossWeighted([1.0, 1.0], (7,), power=1.0, interval=2, decay=0.9, floor=0.1)
    with pytest.raises(BadInputError, match="drew from 3 sources by their losses"):
        order.load_state_dict(weighted(2).state_dict())


def test_groups_are_drawn_in_their_shares() -> None:
    order = weighted()
    drawn = [group for _ in range(10) for group, _ in order.draw(300)]
    assert chi_square_p(np.bincount(drawn), 3000 * np.array([0.25, 0.25, 0.5])) > 1e-3
    for _ in range(10):
        order.observe(LOSSES)
    # weight x loss = 4, 1, 4 of 9, a tenth of it by weight alone.
    expected = 0.9 * np.array([4, 1, 4]) / 9 + 0.1 * np.array([0.25, 0.25, 0.5])
    assert order.shares == pytest.approx(expected)
    drawn = [group for _ in range(10) for group, _ in order.draw(300)]
    assert chi_square_p(np.bincount(drawn), 3000 * expected) > 1e-3
    assert chi_square_p(np.bincount(drawn), 3000 * np.array([0.25, 0.25, 0.5])) < 1e-6


def test_the_running_loss_forgets_and_waits_for_what_it_does_not_know() -> None:
    order = weighted(interval=1, decay=0.5, floor=1e-9)
    for loss in ([8.0, np.nan, np.nan], [4.0, np.nan, 2.0], [4.0, np.nan, 2.0]):
        order.draw(1)
        order.observe(np.array(loss))
    # Running: 8 -> 6 -> 5; unknown, so their mean of 3.5; 2 -> 2.
    raw = np.array([5.0, 3.5, 2 * 2.0])
    assert order.shares == pytest.approx(raw / raw.sum(), rel=1e-6)


def test_every_sample_of_a_group_comes_in_turn() -> None:
    order = weighted()
    drawn = [one for _ in range(10) for one in order.draw(20)]
    for group in range(3):
        assert [turn for one, turn in drawn if one == group] == list(range(sum(one == group for one, _ in drawn)))


def test_it_draws_ahead_to_the_next_change_and_no_further() -> None:
    order = weighted(interval=3)
    for _ in range(3):
        assert order.may_draw
        order.draw(5)
    assert not order.may_draw
    with pytest.raises(AssertionError):
        order.draw(5)
    for _ in range(2):
        order.observe(LOSSES)
        assert not order.may_draw
    order.observe(LOSSES)
    assert order.may_draw


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("stop", range(12))
def test_resuming_draws_what_would_have_come(stop: int, ahead: int) -> None:
    """Also where the order was asked for more than was trained on; and the state is small, and JSON."""

    def run(order: LossWeighted, begin: int, end: int) -> list[list[tuple[int, int]]]:
        planned: list[list[tuple[int, int]]] = []
        for step in range(begin, end):
            while order.may_draw and len(planned) < step - begin + ahead:
                planned.append(order.draw(6))
            order.observe(LOSSES + 0.1 * step)
        return planned[: end - begin]

    straight = run(weighted(interval=4), 0, 12)
    first = weighted(interval=4)
    before = run(first, 0, stop)
    state = json.dumps(first.state_dict())
    assert len(state) < 500
    second = weighted(interval=4)
    second.load_state_dict(json.loads(state))
    assert before + run(second, stop, 12) == straight
