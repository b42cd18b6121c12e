"""The report: sections, tables and figures, as a page and as one HTML file."""

import re
from html.parser import HTMLParser

import pytest
from grng.benchmarks.bench import Store, Trial, figures
from grng.benchmarks.bench.report import write_report
from grng.benchmarks.errors import InputError

from .bench_tools import made, target

TITLES = (
    "Scores",
    "Ours against the best rival",
    "Ours against each rival",
    "Who is ahead in the end",
    "What the regularization does",
    "Workloads",
    "small",
    "transformers:vit",
    "What fewer trials come to",
    "Cost",
    "Settings of the runs",
    "Diagnostics",
    "Targets",
)
TARGETS = {name: target(name) for name in ("small", "transformers:vit")}
NAMES = ("kalman", "kalman/rho=0", "adamw", "soap")
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags match; gathers tables, pictures and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tables, self.pictures, self.ids, self.links, self.titles = [], [], [], set(), [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "img":
            self.pictures.append((values["alt"], values["src"]))
        self.links += [values["href"]] if "href" in values else []
        self.ids |= {values["id"]} if "id" in values else set()
        self.titles += [""] if tag == "h2" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.titles[-1] += data


def outcomes(workloads=tuple(TARGETS), phases=("run", "tune")):
    found = []
    for workload in workloads:
        for i, name in enumerate(NAMES):
            settings = {"lr": 0.1 * (i + 1), "gnp": {"r": 0.05}}
            values = [0.5, 0.8, 0.95 - 0.1 * (name == "soap")]
            for seed in range(2):
                run = made(workload, name, values, seed=seed, pace=1.0 + i + seed / 9, settings=settings)
                run.rows[-1] |= {"gradient_norm": 0.5, "pearson": 0.25}
                found.append(run)
                tune = {"phase": "tune", "study": 0, "number": seed, "seed": seed}
                found.append(made(workload, name, values, pace=2.0 + i, settings=settings, **tune))
    found.append(made("small", "kfac", [0.5], status="failed", message="<b>odd</b>", step_seconds={}))
    return [o for o in found if o.trial["phase"] in phases]


def written(folder, found, **options):
    store = Store(folder)
    store.prepare()
    for o in found:
        store.write(Trial(**o.trial), o)
    return write_report(store, options.pop("clock", "seconds"), **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    page = folder.parent / "docs" / "deep" / "page.md"
    return folder, page, written(folder, outcomes(), page=page, targets=TARGETS)


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes most of the time."""
    monkeypatch.setattr("grng.benchmarks.bench.report.draw_figures", lambda analysis: {})


def tables_of(text):
    """By heading of Markdown."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    found = {}
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("|")]
        found[title] = [rows[0], *rows[2:]] if rows else []
    return found


def test_what_is_written(whole):
    folder, page, paths = whole
    assert paths == [folder / "report.html", folder / "results.md", page]
    assert (folder / "results.csv").exists()
    assert (folder / "outcomes.json.xz").exists()


def test_the_page_has_every_section_and_its_figures_exist(whole):
    folder, page, _ = whole
    for path in (folder / "results.md", page):
        text = path.read_text()
        assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == TITLES
        shown = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
        assert {name for name, _ in shown} == {
            *("profile", "times", "budget"),
            *(f"{kind}-{w}" for kind in ("curves", "sensitivity") for w in TARGETS),
        }
        assert len(shown) == len({place for _, place in shown}) == 7
        assert all((path.parent / place).read_bytes().startswith(b"\x89PNG") for _, place in shown)
    assert "2 workloads, 5 optimizers: 16 trials of the search and 17 runs on up to 2 paired seeds" in text
    assert "seconds of training" in text


@pytest.mark.parametrize("name", ["torch", "grng", "processor", "threads"])
def test_what_does_not_compare_is_named(name, tmp_path, no_figures):
    """Runs of one workload from two machines, or two versions; of the other from one of them."""
    found = outcomes()
    for o in found[::2]:
        if o.workload == "small":
            o.environment[name] = "another"
    text = written(tmp_path, found, targets=TARGETS)[1].read_text()
    assert "so that times do not compare: small." in text
    assert "(small, transformers:vit); " in text
    assert "data" not in text.partition("\n## ")[0]


def test_data_that_changed_is_named(tmp_path, no_figures):
    found = outcomes()
    next(o for o in found if o.workload == "small").data = "another"
    text = written(tmp_path, found, targets=TARGETS)[1].read_text()
    assert "Made with data that changed in between: small." in text
    assert "several machines" not in text


def test_the_numbers(whole):
    tables = tables_of((whole[0] / "results.md").read_text())
    for title, rows in tables.items():
        assert len({len(row) for row in rows}) == 1, title
    scores = {row[0]: row for row in tables["Scores"][1:]}
    assert set(scores) == set(NAMES), "kfac did not run everywhere"
    assert scores["kalman"][1:4] == ["1.000", "1.000", "1.00"]
    assert scores["adamw"][3] == "2.89", "times of 9 and 9.33 over a median of 3.17"
    assert scores["soap"][1:4] == ["0.000", "0.000", "4.00"]
    assert (scores["kalman"][4:], scores["soap"][4:]) == (["2/2", "0"], ["0/2", "0"])
    lines = {row[0]: row for row in tables["small"][1:]}
    assert list(lines) == ["kalman", "kalman/rho=0", "adamw", "soap", "kfac"]
    assert lines["kalman"][1:7] == ["3.167", "30", "60", "2/2", "0.95 ± 0", "0.95 ± 0"]
    assert lines["soap"][1:5] == ["missed", "missed", "missed", "0/2"]
    assert lines["kfac"][5:8] == ["–", "–", "–"]
    assert [row[:3] for row in tables["What the regularization does"][1:]] == [
        [w, "kalman", "kalman/rho=0"] for w in TARGETS
    ]
    assert tables["Ours against the best rival"][1][1:3] == ["kalman", "adamw"]
    ends = dict(zip(*tables["Who is ahead in the end"], strict=True))
    assert ends == {"ahead on": "kalman", "kfac": "1/1 (+0 −0)", "adamw": "0/2 (+0 −0)", "soap": "2/2 (+0 −0)"}
    assert tables["Settings of the runs"][1][3] == "lr=0.1, gnp.r=0.05"
    assert tables["Diagnostics"][1] == ["small", "kalman", "0.5", "0.25", "–"]
    assert tables["Targets"][1][3] == "lr=0.1, betas=(0.9, 0.99)"
    assert len(tables["Cost"]) == 1 + 2 * len(NAMES)


def test_the_html_holds_the_same(whole):
    text = (whole[0] / "report.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    tables = tables_of((whole[0] / "results.md").read_text())
    assert tuple(page.titles) == tuple(tables) == TITLES
    assert page.tables == list(tables.values())
    assert {link.removeprefix("#") for link in page.links} == page.ids
    assert len(page.pictures) == 7
    assert all(source.startswith("data:image/png;base64,iVBOR") for _, source in page.pictures)
    assert not re.search(r'(src|href)="(?!data:|#)', text), "nothing is fetched from elsewhere"


@pytest.mark.usefixtures("no_figures")
def test_without_targets_no_time_is_shown(tmp_path):
    written(tmp_path, outcomes(("small",)), targets={})
    tables = tables_of((tmp_path / "results.md").read_text())
    assert tuple(tables) == (
        "Who is ahead in the end",
        "Workloads",
        "small",
        "What fewer trials come to",
        "Cost",
        "Settings of the runs",
        "Diagnostics",
    )
    assert tables["small"][0][:3] == ["optimizer", "best accuracy", "test accuracy"]


@pytest.mark.parametrize("name", ["timm:a/b", "transformers:/some/folder"])
def test_names_with_slashes_make_figures_too(tmp_path, name):
    written(tmp_path, [made(name, "adamw", [0.5, 0.9])], targets={})
    [place] = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "results.md").read_text())
    assert len(place.split("/")) == 2
    assert (tmp_path / place).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("clock", figures.CLOCKS)
def test_every_clock_and_a_search_alone(tmp_path, clock):
    found = outcomes(("small",), ("tune",)) if clock == "step" else outcomes(("small",), ("run",))
    written(tmp_path, found, clock=clock, targets=TARGETS)
    text = (tmp_path / "results.md").read_text()
    assert "## Scores" in text
    assert figures.CLOCKS[clock] in text


def test_runs_that_all_missed_or_failed(tmp_path):
    found = [
        *(made("small", "kalman", [0.1, None], seed=s, status="diverged", settings={"lr": 0.1}) for s in range(2)),
        *(made("small", "kalman/rho=0", [0.1], seed=s) for s in range(2)),
        *(made("small", "adamw", [], seed=s, status="failed", step_seconds={}) for s in range(2)),
        made("small", "kalman", [None], phase="tune"),
    ]
    written(tmp_path, found, targets=TARGETS)
    tables = tables_of((tmp_path / "results.md").read_text())
    assert tables["Ours against the best rival"][1][3:] == ["both missed with every seed", "0", "all"]
    assert [row[4] for row in tables["small"][1:]] == ["0/2"] * 3


@pytest.mark.usefixtures("no_figures")
def test_what_is_odd_is_escaped(tmp_path):
    found = [made("small", "adamw/<i>", [0.5], settings={"mode": "<script>"})]
    written(tmp_path, found, targets=TARGETS)
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text
    assert "adamw/<i>" not in text
    assert "adamw/&lt;i&gt;" in text


@pytest.mark.parametrize(("folder", "clock"), [("empty", "seconds"), ("none", "seconds")])
def test_no_runs(tmp_path, folder, clock):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{folder} holds no runs: make some with grng bench tune or grng bench run"):
        write_report(Store(tmp_path / folder), clock)
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_an_unknown_clock(tmp_path):
    with pytest.raises(
        InputError, match="unknown clock 'hours': choose one of seconds, cpu_seconds, step, evaluations"
    ):
        written(tmp_path, outcomes(("small",)), clock="hours")


@pytest.mark.usefixtures("no_figures")
def test_lengths_and_searches_that_differ_are_named(tmp_path):
    """A look of a part of the length cannot be taken for the whole; nor a search of fewer trials for an equal one."""
    found = [made("small", "adamw", [0.9], seed=0), made("small", "soap", [0.9], seed=0)]
    found[1].trial["budget"] = 0.1
    found += [made("small", "adamw", [0.9], phase="tune", number=i) for i in range(2)]
    found += [made("small", "soap", [0.9], phase="tune")]
    written(tmp_path, found)
    text = (tmp_path / "results.md").read_text()
    assert "Runs are of 0.1 or 1 times the full length." in text
    assert "Made at different lengths, so that they do not compare: small." in text
    assert "Searched by different numbers of trials: small." in text
