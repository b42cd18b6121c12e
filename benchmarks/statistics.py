"""What runs of several optimizers on several workloads come to: profiles and scores, intervals of paired ratios, IQM.

Times are to a target, in seconds, steps or gradient evaluations; a run that misses it has the time inf.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")
Times = Mapping[str, Mapping[str, float]]  # workload -> optimizer -> time

DIGITS = 5  # of a target: the machine's rounding is not to decide
FEWEST_PAIRS = 6  # that can differ at 95 %: five of five alike happen by chance in one case of sixteen
SIGNED: Any = {"posinf": math.inf, "neginf": -math.inf}
MOST = 4.0  # an optimizer that takes longer than so many times the fastest's time gets no credit for a workload


def present(values: Iterable[T | None]) -> list[T]:
    """Those that were measured."""
    return [value for value in values if value is not None]


def study_time(studies: Sequence[Sequence[float]]) -> float:
    """AlgoPerf's time of a workload: the median over the studies of each one's fastest trial, misses included.

    >>> study_time([[5.0, 3.0], [math.inf, math.inf], [4.0, 9.0]])
    4.0
    """
    return median(min(trials) for trials in studies)


def at_target(value: float, target: float, goal: str) -> bool:
    """Whether a value is the target or better, to the five digits that targets are frozen with.

    >>> at_target(282 / 287, 0.98258, "max"), at_target(281 / 287, 0.98258, "max")  # 282/287 is 0.982578
    (True, False)
    """
    rounded = float(f"{value:.{DIGITS}g}")
    return rounded >= target if goal == "max" else rounded <= target


def expected_best(values: Sequence[float]) -> list[float]:
    """The mean of the largest of n of the values, drawn without putting back, for n = 1, 2, ...: what a search of n
    trials comes to.

    >>> expected_best([0.0, 1.0, 0.0])
    [0.3333333333333333, 0.6666666666666666, 1.0]
    """
    ascending, size = sorted(values), len(values)
    return [
        sum(value * math.comb(below, n - 1) for below, value in enumerate(ascending)) / math.comb(size, n)
        for n in range(1, size + 1)
    ]


def ratios(times: Times) -> dict[str, list[float]]:
    """By optimizer, its time over the fastest's, one a workload; inf where it missed the target.

    >>> ratios({"a": {"sgd": 2.0, "ring": 1.0}, "b": {"sgd": math.inf, "ring": math.inf}})
    {'sgd': [2.0, inf], 'ring': [1.0, inf]}
    """
    names = list(dict.fromkeys(name for row in times.values() for name in row))
    found: dict[str, list[float]] = {name: [] for name in names}
    for row in times.values():
        best = min(row.values())
        if not best > 0:
            raise ValueError(f"a time is {best!r}: times are positive")
        for name in names:
            own = row.get(name, math.inf)
            found[name].append(own / best if own < math.inf else math.inf)
    return found


def profile(times: Times, tau: Sequence[float]) -> dict[str, list[float]]:
    """Dolan-More performance profiles: the share of workloads on which an optimizer takes at most tau times the
    fastest's time (Dolan & More 2002).

    >>> profile({"a": {"sgd": 2.0, "ring": 1.0}, "b": {"sgd": 3.0, "ring": 4.0}}, [1.0, 1.5, 2.0])
    {'sgd': [0.5, 0.5, 1.0], 'ring': [0.5, 1.0, 1.0]}
    """
    return {name: [sum(r <= t for r in own) / len(own) for t in tau] for name, own in ratios(times).items()}


def scores(times: Times, most: float = MOST) -> dict[str, float]:
    """AlgoPerf's score: the profile's mean over tau in [1, most], in closed form.

    >>> scores({"a": {"sgd": 2.5, "ring": 1.0}, "b": {"sgd": 3.0, "ring": math.inf}})
    {'sgd': 0.75, 'ring': 0.5}
    """
    return {name: sum(max(0.0, most - r) / (most - 1) for r in own) / len(own) for name, own in ratios(times).items()}


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest quarter.

    >>> interquartile_mean([0.0, 1.0, 2.0, 100.0])
    1.5
    """
    from scipy.stats import trim_mean

    return float(trim_mean(values, 0.25))


@dataclass(frozen=True)
class Ratio:
    """A paired ratio of times with its interval.

    Attributes:
        median: of the pairs' ratios.
        low, high: bounds of the bootstrap interval.
        pairs: that were used.
        undecided: pairs in which both missed the target.
    """

    median: float
    low: float
    high: float
    pairs: int
    undecided: int

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 1 and is one of enough pairs."""
        return self.pairs >= FEWEST_PAIRS and not self.low <= 1 <= self.high

    def __str__(self) -> str:
        if self.pairs < FEWEST_PAIRS:
            return f"{self.median:.2f}: too few pairs"
        shown = f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"
        return shown if self.differs else f"{shown}: no difference shown"


def paired_ratio(own: Sequence[float], theirs: Sequence[float], level: float = 0.95, seed: int = 0) -> Ratio:
    """The median of own/theirs over pairs (one seed each), with a percentile bootstrap over the pairs of the logs.

    A pair in which one misses the target counts as an infinite ratio, or as zero; where both miss it says nothing.
    Exchanged, the two have the reciprocal ratio.

    >>> print(paired_ratio([1.0, 1.1, 0.9, 1.0, 1.1, 1.0], [2.0] * 6))
    0.50 (0.47 to 0.55)
    >>> print(paired_ratio([1.0, 1.1, math.inf], [2.0, 2.0, math.inf]))
    0.52: too few pairs

    Raises:
        ValueError: the sequences differ in length, or no pair decides.
    """
    if len(own) != len(theirs):
        raise ValueError(f"{len(own)} times against {len(theirs)}: pair them, one each a seed")
    pairs = [(a, b) for a, b in zip(own, theirs, strict=True) if min(a, b) < math.inf]
    if not pairs:
        raise ValueError("both missed the target with every seed: there is no ratio")
    logs = [-math.inf if b == math.inf else math.inf if a == math.inf else math.log(a / b) for a, b in pairs]
    middle, low, high = map(math.exp, _median_interval(logs, level, seed))
    return Ratio(middle, low, high, len(pairs), len(own) - len(pairs))


def paired_lead(own: Sequence[float], theirs: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[int, bool]:
    """Which of two has the larger values, and whether that is shown.

    By the median of the differences over pairs (one seed each): 1 for `own`, -1 for `theirs`, 0 for neither. It is
    shown where a percentile bootstrap over at least six pairs leaves out zero. -inf is the value of a run that came to
    none; where both did, the pair says nothing.

    >>> paired_lead([0.9] * 6, [0.8] * 6), paired_lead([0.9] * 5, [0.8] * 5), paired_lead([0.7, 0.9], [0.8, 0.8])
    ((1, True), (1, False), (0, False))
    """
    known = [(a, b) for a, b in zip(own, theirs, strict=True) if max(a, b) > -math.inf]
    if not known:
        return 0, False
    middle, low, high = _median_interval([a - b for a, b in known], level, seed)
    rounding = 1e-12 * max(abs(value) for pair in known for value in pair if value > -math.inf)
    sign = (middle > rounding) - (middle < -rounding)
    return sign, sign != 0 and len(known) >= FEWEST_PAIRS and (low > rounding or high < -rounding)


def _median_interval(values: Sequence[float], level: float, seed: int) -> tuple[float, float, float]:
    """The median, and a percentile bootstrap's bounds of it."""
    import numpy as np

    known = np.array(values)
    drawn = np.random.default_rng(seed).integers(len(known), size=(10_000, len(known)))
    with np.errstate(invalid="ignore"):
        # Where the middle two are infinite and of unlike sign, each was ahead in half of the pairs.
        middle, medians = (np.nan_to_num(np.median(x, axis=-1), nan=0.0, **SIGNED) for x in (known, known[drawn]))
    low = np.quantile(medians, (1 - level) / 2, method="lower")
    high = np.quantile(medians, (1 + level) / 2, method="higher")
    return float(middle), float(low), float(high)
