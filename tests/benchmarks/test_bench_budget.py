"""Budget curves: every choice of n trials gone through, by hand."""

import itertools
import random
from statistics import fmean

import pytest
from grng.benchmarks.bench.analysis import analyse
from grng.benchmarks.bench.budget import budget_curves, budget_section, shares_beaten
from grng.benchmarks.bench.figures import draw_figures
from grng.benchmarks.bench.protocol import TARGET_STUDY
from grng.benchmarks.statistics import expected_best

from .bench_tools import made, target

GOALS = {"up": target("up", 0.9), "down": target("down", 0.1, "min")}


def search(workload, optimizer, values, goal="max"):
    return [made(workload, optimizer, [v], phase="tune", number=i, goal=goal) for i, v in enumerate(values)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_expected_best_is_the_mean_over_all_choices(size):
    values = [random.Random(size).gauss(0, 1) for _ in range(size)]
    brute = [fmean(max(chosen) for chosen in itertools.combinations(values, n)) for n in range(1, size + 1)]
    assert expected_best(values) == pytest.approx(brute)


@pytest.mark.parametrize(
    ("goal", "values", "shares"),
    [
        ("max", [0.1, 0.5, 0.9], [0.0, 0.5, 1.0]),
        ("min", [0.1, 0.5, 0.9], [1.0, 0.5, 0.0]),
        ("max", [0.5, 0.5, 0.9], [0.25, 0.25, 1.0]),
        ("max", [None, None, 0.2], [0.25, 0.25, 1.0]),
        ("min", [None, 0.2, 0.3], [0.0, 1.0, 0.5]),
        ("max", [0.3], [0.0]),
    ],
)
def test_shares_beaten(goal, values, shares):
    trials = search("up", "adamw", values, goal)
    assert [share for _, share in shares_beaten(trials)] == shares
    assert [o for o, _ in shares_beaten(trials)] == trials


OUTCOMES = [
    *search("up", "ring", [0.95, 0.5]),
    *search("up", "adamw", [0.6, 0.7]),
    *search("down", "ring", [0.05, 0.09], "min"),
    *search("down", "adamw", [0.5, 0.08, 0.9], "min"),
    *search("up", "soap", [0.99]),  # not everywhere
    made("up", "ring", [0.9], phase="run"),
    made("up", "adamw", [0.99], phase="tune", study=TARGET_STUDY),
]


def test_curves_by_hand():
    found = budget_curves(analyse(OUTCOMES, GOALS, "step"))
    assert list(found) == ["ring", "adamw"], "the better first; who did not search everywhere is left out"
    reached, beaten = found["ring"]
    assert reached == pytest.approx([(1 / 2 + 1) / 2, 1.0])
    # up, ascending: 0.5, 0.6, 0.7, 0.95, 0.99; down, best last: 0.9, 0.5, 0.09, 0.08, 0.05
    assert beaten == pytest.approx([((0.75 + 0.0) / 2 + (1.0 + 0.5) / 2) / 2, (0.75 + 1.0) / 2])
    reached, beaten = found["adamw"]
    assert reached == pytest.approx([(0 + 1 / 3) / 2, (0 + 2 / 3) / 2]), "as far as its shortest search goes"


def test_the_section_and_the_figure():
    analysis = analyse(OUTCOMES, GOALS, "step")
    section = budget_section(analysis, ["budget"])
    assert section.headings == ("optimizer", "target, 1", "target, 2", "beats, 1", "beats, 2")
    assert section.rows[0] == ["ring", "0.75", "1.00", "0.56", "0.88"]
    assert section.figures == ["budget"]
    figure = draw_figures(analysis)["budget"]
    assert [len(axis.lines) for axis in figure.axes] == [2, 2]


def test_without_a_search_there_is_none():
    analysis = analyse([made("up", "ring", [0.9])], GOALS, "step")
    assert budget_section(analysis, []) is None
    assert "budget" not in draw_figures(analysis)


def test_without_a_target_values_alone_are_shown():
    rows = budget_section(analyse(OUTCOMES, {}, "step"), []).rows
    assert rows[0] == ["ring", "–", "–", "0.56", "0.88"]
