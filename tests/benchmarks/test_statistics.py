"""Profiles, scores and intervals against numerical integration, SciPy and coverage by simulation."""

import itertools
import math

import numpy as np
import pytest
from grng.benchmarks.statistics import (
    DIGITS,
    Ratio,
    at_target,
    interquartile_mean,
    paired_ratio,
    profile,
    ratios,
    scores,
    study_time,
)


def made(seed: int, workloads: int, optimizers: int, misses: float) -> dict[str, dict[str, float]]:
    generator = np.random.default_rng(seed)
    times = np.exp(generator.normal(size=(workloads, optimizers)))
    times[generator.random(times.shape) < misses] = np.inf
    return {f"w{i}": {f"o{j}": float(t) for j, t in enumerate(row)} for i, row in enumerate(times)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("misses", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("most", [2.0, 4.0])
def test_scores_integrate_the_profiles(seed: int, misses: float, most: float) -> None:
    """AlgoPerf integrates numerically; the steps lie at the ratios, where the rule is refined."""
    times = made(seed, 7, 4, misses)
    jumps = sorted({r for own in ratios(times).values() for r in own if r <= most} | {1.0, most})
    for name, score in scores(times, most).items():
        pieces = [(b - a) * profile(times, [(a + b) / 2])[name][0] for a, b in itertools.pairwise(jumps)]
        assert score == pytest.approx(sum(pieces) / (most - 1), abs=1e-9)
        tau = np.linspace(1, most, 20001)
        numeric = np.trapezoid(profile(times, list(tau))[name], tau) / (most - 1)
        assert score == pytest.approx(numeric, abs=5e-4)


def test_profiles_are_of_the_fastest() -> None:
    times = {"a": {"x": 1.0, "y": 4.0}, "b": {"x": math.inf, "y": 2.0}, "c": {"y": 1.0}}
    assert ratios(times) == {"x": [1.0, math.inf, math.inf], "y": [4.0, 1.0, 1.0]}
    assert profile(times, [1.0, 4.0]) == {"x": [1 / 3, 1 / 3], "y": [2 / 3, 1.0]}
    assert scores(times)["y"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="positive"):
        scores({"a": {"x": 0.0}})


def test_a_study_is_its_fastest_trial() -> None:
    assert study_time([[3.0], [1.0, 9.0], [2.0]]) == 2.0
    assert study_time([[math.inf], [math.inf, math.inf], [2.0]]) == math.inf


def test_interquartile_mean() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert interquartile_mean(list(values)) == pytest.approx(np.sort(values)[10:30].mean())


def test_paired_ratio_covers() -> None:
    """The interval of twenty pairs covers the true median in about 95 of 100 experiments, and a shared factor of a pair
    does not matter."""
    generator, inside = np.random.default_rng(1), 0
    for i in range(200):
        shared = np.exp(3 * generator.normal(size=20))
        own = shared * 0.8 * np.exp(0.2 * generator.normal(size=20))
        found = paired_ratio(list(own), list(shared), seed=i)
        inside += found.low <= 0.8 <= found.high
    assert 180 <= inside <= 199


@pytest.mark.parametrize("pairs", [2, 3, 6, 9, 10])
def test_exchanged_the_ratio_is_the_reciprocal(pairs: int) -> None:
    generator = np.random.default_rng(pairs)
    for i in range(40):
        own, theirs = np.exp(generator.normal(size=(2, pairs)))
        missed = generator.random((2, pairs)) < 0.2 * (i % 3)
        own, theirs = np.where(missed[0], np.inf, own), np.where(missed[1] & ~missed[0], np.inf, theirs)
        if missed[0].all():
            continue
        found, back = paired_ratio(own, theirs), paired_ratio(theirs, own)
        assert found.differs == back.differs
        for value, other in ((found.median, back.median), (found.low, back.high), (found.high, back.low)):
            assert value == pytest.approx(1 / other if other else math.inf)


def test_misses_in_pairs() -> None:
    inf = math.inf
    found = paired_ratio([1.0, 1.0, 1.0, inf, inf], [2.0, 2.0, inf, 2.0, inf])
    assert (found.median, found.pairs, found.undecided) == (0.5, 4, 1)
    assert found.low == 0.0
    assert found.high == inf
    assert not found.differs
    assert "no difference shown" in str(paired_ratio([1.0] * 5 + [inf] * 5, [2.0] * 5 + [1.0] * 5))
    assert paired_ratio([1.0] * 4, [inf] * 4).median == 0.0
    assert Ratio(0.5, 0.4, 0.6, 6, 0).differs
    assert not Ratio(0.5, 0.4, 0.6, 5, 0).differs
    assert "too few pairs" in str(Ratio(0.5, 0.4, 0.6, 5, 0))
    assert paired_ratio([0.6, 0.7, inf, inf], [1.0] * 4).median == inf, "half of them missed"
    assert paired_ratio([1.0, inf], [inf, 1.0]).median == 1.0
    with pytest.raises(ValueError, match="every seed"):
        paired_ratio([inf], [inf])
    with pytest.raises(ValueError, match="2 times against 1"):
        paired_ratio([1.0, 1.0], [1.0])


@pytest.mark.parametrize(("goal", "sign"), [("max", 1), ("min", -1)])
@pytest.mark.parametrize("median", [282 / 287, 2 / 3, 1234.5678, 1e-7 / 3])
def test_the_median_that_a_target_was_rounded_from_reaches_it(median: float, goal: str, sign: int) -> None:
    target = float(f"{median:.{DIGITS}g}")
    assert at_target(median, target, goal)
    assert at_target(median * (1 + sign * 1e-3), target, goal)
    assert not at_target(median * (1 - sign * 1e-3), target, goal)
