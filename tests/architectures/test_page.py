"""docs/architectures.md is made of the committed results, and these are of the grid as it is."""

import json
from pathlib import Path

import pytest
from grng.benchmarks.architectures import ARCHITECTURES
from grng.benchmarks.architectures.judge import ENGINES, VARIANTS
from grng.benchmarks.architectures.page import GRID, THEIRS, render
from grng.benchmarks.architectures.rivals import RIVALS, judge

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results" / "architectures"
OURS = json.loads((RESULTS / GRID).read_text())
RIVALS_FOUND = json.loads((RESULTS / THEIRS).read_text())


def test_the_page_is_that_of_the_committed_results() -> None:
    assert (DOCS / "architectures.md").read_text() == render(OURS, RIVALS_FOUND)


def test_the_results_are_of_the_whole_grid_and_without_faults() -> None:
    assert list(OURS["cells"]) == list(ARCHITECTURES)
    for row in OURS["cells"].values():
        assert list(row["cells"]) == [f"{variant} {engine}" for variant in VARIANTS for engine in ENGINES]
        assert "FAULT" not in {cell["symbol"] for cell in row["cells"].values()}


def test_every_rival_was_measured_on_every_row_that_it_can_run() -> None:
    assert list(RIVALS_FOUND["packages"]) == list(RIVALS)
    for package in RIVALS_FOUND["packages"].values():
        assert package["version"] != "absent"
        assert ARCHITECTURES.keys() - package["cells"].keys() == {"unfrozen_later", "unet2d"}


# BackPACK is in every development environment: the judge is tried on it.
MEASURED = {"mlp": "ok", "conv2d": "~", "conv2d_circular": "WRONG", "half_frozen": "skip", "residual": "raise"}


@pytest.mark.parametrize("name", MEASURED)
def test_the_judge_measures_anew_what_is_committed(name: str) -> None:
    pytest.importorskip("backpack")
    assert judge(ARCHITECTURES[name], RIVALS["backpack"]).symbol == MEASURED[name]
    assert RIVALS_FOUND["packages"]["backpack"]["cells"][name]["symbol"] == MEASURED[name]
