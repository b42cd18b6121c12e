"""Every Python example in README and docs runs as it stands; "continued" blocks go on where the last one ended."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python( continued)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples(page: Path) -> list[str]:
    scripts: list[str] = []
    for continued, code in FENCE.findall(page.read_text()):
        if continued:
            scripts[-1] += code
        else:
            scripts.append(code)
    return scripts


CASES = [pytest.param(code, id=f"{page.stem}-{i}") for page in PAGES for i, code in enumerate(examples(page))]


@pytest.mark.parametrize("code", CASES)
def test_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "example"}
    exec(compile(code, "example", "exec"), scope)
    optimizer = scope["opt"]
    treatments = {row.treatment for row in optimizer.coverage()}  # type: ignore[attr-defined]
    assert treatments - {"adamw"}, "the example preconditions nothing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


RESULTS = ROOT / "docs" / "results"


COMMITTED = {
    "regularizers.md": ("regularizers-digits", "regularizers-fashion", "regularizers-cost"),
    "kalman.md": ("kalman-uci", "kalman-shift", "kalman-p0", "kalman-stream"),
}


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in COMMITTED.items() for name in names])
def test_tables_are_those_of_the_committed_runs(page: str, name: str) -> None:
    table = (RESULTS / name / "table.md").read_text().strip()
    assert table in (ROOT / "docs" / page).read_text()


def test_costs_are_rows_of_the_committed_run() -> None:
    """The page shows a part of the table."""
    rows = set((RESULTS / "kalman-cost" / "table.md").read_text().splitlines())
    page = (ROOT / "docs" / "kalman.md").read_text().splitlines()
    start = page.index(next(line for line in page if line.startswith("| parameters | classes | method |")))
    shown = [line for line in page[start:] if line.startswith("|")]
    assert len(shown) > 10
    assert set(shown) <= rows
