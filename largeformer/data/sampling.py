"""Orders: from a place in training to the sample that stands there. `n` samples, `k` a place, counted over all ranks.

All but one are pure functions of the place and the seed. So every rank computes the same order and takes its part of it, a run that
resumes needs nothing but how many samples were consumed, and neither layout nor number of loading processes can change it.
`LossWeighted` follows the losses; what it must remember is small, and stands in the checkpoint.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from largeformer.errors import BadInputError

_BLOCK = 4096


class Order(Protocol):
    """`order(k)`: the number of the sample that stands at place k."""

    def __call__(self, place: int) -> int: ...


@dataclass
class ShuffledEpochs:
    """Each epoch is all n samples once, in an order of its own. `first`: int[n], that of the first epoch, where it is given."""

    size: int
    seed: tuple[int, ...]
    first: npt.NDArray[Any] | None = None
    _made: dict[int, npt.NDArray[Any]] = field(default_factory=dict, repr=False)

    def __call__(self, place: int) -> int:
        epoch, place = divmod(place, self.size)
        if epoch == 0 and self.first is not None:
            return int(self.first[place])
        if epoch not in self._made:
            if len(self._made) > 1:  # Training goes forward; two are kept for batches that span a border.
                del self._made[min(self._made)]
            smallest = np.min_scalar_type(self.size)
            self._made[epoch] = np.random.default_rng([*self.seed, epoch]).permutation(self.size).astype(smallest)
        return int(self._made[epoch][place])


@dataclass
class Uniform:
    """`uniform(k)`: a number in [0, 1) that depends on the seed and k alone."""

    seed: tuple[int, ...]
    _block: tuple[int, npt.NDArray[np.float64]] | None = field(default=None, repr=False)

    def __call__(self, place: int) -> float:
        block, place = divmod(place, _BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = (block, np.random.default_rng([*self.seed, block]).random(_BLOCK))
        return float(self._block[1][place])


def competence(pacing: str, start: float, steps: int) -> Callable[[float], float]:
    """The share of the samples, easiest first, that may be drawn when the part t in [0, 1) of the curriculum is over.

    linear and root: c(t) = (t (1 - c0^p) + c0^p)^(1/p) with p = 1 and 2 (Platanios et al. 2019, arXiv:1903.09848, equations 6
    and 7). step: from c0 to 1 in `steps` equal stairs.
    """
    if pacing == "step":
        return lambda t: start + (1.0 - start) * min(math.floor(t * steps) / max(steps - 1, 1), 1.0) if steps > 1 else 1.0
    power = {"linear": 1, "root": 2}[pacing]
    return lambda t: (t * (1.0 - start**power) + start**power) ** (1.0 / power)


class Curriculum:
    """Place k is drawn uniformly from the easiest `share(k / span)` of the samples; from `span` on come shuffled epochs.

    difficulty: float[n]; equally difficult samples stay in their order.
    """

    def __init__(
        self, difficulty: npt.NDArray[np.floating[Any]], share: Callable[[float], float], span: int, seed: tuple[int, ...]
    ) -> None:
        self._easiest_first = np.argsort(difficulty, kind="stable")
        self._share, self._span = share, span
        self._uniform = Uniform((*seed, 1))
        self._afterwards = ShuffledEpochs(len(difficulty), (*seed, 2))

    def pool(self, place: int) -> int:
        """How many of the easiest samples place k is drawn from."""
        size = len(self._easiest_first)
        return size if place >= self._span else max(1, math.ceil(self._share(place / self._span) * size))

    def __call__(self, place: int) -> int:
        if place >= self._span:
            return self._afterwards(place - self._span)
        return int(self._easiest_first[int(self._uniform(place) * self.pool(place))])


@dataclass
class EasiestFirst:
    """Each epoch from the easiest sample to the most difficult, every sample once."""

    easiest_first: npt.NDArray[Any]

    def __call__(self, place: int) -> int:
        return int(self.easiest_first[place % len(self.easiest_first)])


class ClassBalanced:
    """As many samples of each class as of any other, whatever there is of them: every c places hold each of the c classes once,
    in an order of their own, and each class passes through shuffled epochs of its samples.

    labels: int[n].
    """

    def __init__(self, labels: Sequence[int] | npt.NDArray[Any], seed: tuple[int, ...]) -> None:
        of = np.asarray(labels)
        self.classes = np.unique(of)
        members = [np.flatnonzero(of == one) for one in self.classes]
        self._members = members
        self._rounds = [ShuffledEpochs(len(own), (*seed, 1, number)) for number, own in enumerate(members)]
        self._turns = ShuffledEpochs(len(self.classes), (*seed, 2))

    def __call__(self, place: int) -> int:
        drawn = self._turns(place)
        return int(self._members[drawn][self._rounds[drawn](place // len(self.classes))])


def temperature_shares(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """p_i ~ w_i n_i^(1/T) (Arivazhagan et al. 2019, arXiv:1907.05019, section 4.2). They sum to 1."""
    raw = [weight * size ** (1.0 / temperature) for size, weight in zip(sizes, weights, strict=True)]
    return [value / sum(raw) for value in raw]


@dataclass(frozen=True)
class _Moment:
    """Where a `LossWeighted` stands after a step."""

    places: int
    drawn: tuple[int, ...]


class LossWeighted:
    """Groups (sources, classes, single samples) drawn by weight x (running loss)^power, harder ones more often.

    Shares change every `interval` steps only, so that a loader may run ahead in between: `draw` a step's places in order, then
    `observe` the losses of each step in the same order. Losses must be alike on all ranks. A group whose loss is not known yet
    counts with the mean of the others.
    """

    def __init__(self, weights: Sequence[float], seed: tuple[int, ...], *, power: float, interval: int, decay: float, floor: float) -> None:
        self._weights = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._power, self._interval, self._decay, self._floor = power, interval, decay, floor
        self._uniform = Uniform(seed)
        self._losses = np.full(len(weights), np.nan)
        self._shares = self._weights.copy()
        self._done, self._planned = 0, 0
        self._moment = _Moment(0, (0,) * len(weights))
        self._ahead: deque[_Moment] = deque()

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """float64[groups], summing to 1: with what probability each is drawn now."""
        return self._shares.copy()

    @property
    def may_draw(self) -> bool:
        """Whether the next step's shares are known: all steps up to the last change of them were observed."""
        return self._planned < (self._done // self._interval + 1) * self._interval

    def draw(self, count: int) -> list[tuple[int, int]]:
        """The next step: for each of its `count` places the group, and how often that group was drawn before."""
        assert self.may_draw, "the losses of the steps before the last change of shares are missing"
        last = self._ahead[-1] if self._ahead else self._moment
        drawn, borders, made = list(last.drawn), np.cumsum(self._shares), []
        for place in range(last.places, last.places + count):
            group = min(int(np.searchsorted(borders, self._uniform(place), side="right")), len(drawn) - 1)
            made.append((group, drawn[group]))
            drawn[group] += 1
        self._planned += 1
        self._ahead.append(_Moment(last.places + count, tuple(drawn)))
        return made

    def observe(self, losses: npt.NDArray[np.float64]) -> None:
        """The mean loss of each group in the next step that was drawn, float64[groups]; NaN for one that had none in it."""
        self._moment = self._ahead.popleft()
        self._done += 1
        known, old = np.isfinite(losses), np.isfinite(self._losses)
        self._losses[known & ~old] = losses[known & ~old]
        both = known & old
        self._losses[both] = self._decay * self._losses[both] + (1.0 - self._decay) * losses[both]
        if self._done % self._interval == 0 and np.isfinite(self._losses).any():
            filled = np.where(np.isfinite(self._losses), self._losses, np.nanmean(self._losses))
            raw = self._weights * np.maximum(filled, 1e-12) ** self._power
            self._shares = self._floor * self._weights + (1.0 - self._floor) * raw / raw.sum()

    def state_dict(self) -> dict[str, Any]:
        """A few numbers for each group: what a run that resumes after the last observed step must know. JSON."""
        losses = [None if math.isnan(loss) else loss for loss in self._losses.tolist()]
        return {
            "steps": self._done,
            "places": self._moment.places,
            "drawn": list(self._moment.drawn),
            "losses": losses,
            "shares": self._shares.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises BadInputError where it is of another number of groups."""
        if len(state["drawn"]) != len(self._weights):
            raise BadInputError(
                f"the checkpoint drew from {len(state['drawn'])} sources by their losses, and data.sources has {len(self._weights)} now: "
                "give it the same sources, or another data.sampling.type"
            )
        self._done = self._planned = state["steps"]
        self._moment = _Moment(state["places"], tuple(state["drawn"]))
        self._ahead.clear()
        self._losses = np.array([math.nan if loss is None else loss for loss in state["losses"]])
        self._shares = np.array(state["shares"])
