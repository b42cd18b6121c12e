"""Who takes part: rows of the roster, labels, and optimizers of the user's own."""

import csv
import sys

import pytest
import torch
from grng.baselines import OPTIMIZERS, make_optimizer, register_optimizer
from grng.benchmarks.bench import ROSTER, Job, Store, protocol
from grng.benchmarks.bench.roster import PLAIN, contestant_of
from grng.benchmarks.bench.spaces import HORIZON, find_contestant
from grng.benchmarks.cli import make_app
from grng.benchmarks.errors import InputError
from grng.benchmarks.loop import Stepper
from torch import nn
from typer.testing import CliRunner

from .bench_tools import small_workload

PARAMS = """
import torch

def build(params, lr=1e-3, damping=0.0):
    return torch.optim.SGD(params, lr=lr, weight_decay=damping)
"""
MODEL = """
import torch

def build(model, lr=1e-3):
    return torch.optim.SGD([model.weight], lr=lr)
"""
SPACE = 'SPACE = {"lr": (1e-3, 1e-1), "damping": (1e-4, 1e-1)}\n'


@pytest.fixture(autouse=True)
def as_before():
    """What is registered here is forgotten."""
    before = dict(OPTIMIZERS)
    yield
    OPTIMIZERS.clear()
    OPTIMIZERS.update(before)


def file(folder, text, name="mine.py"):
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("row", ROSTER, ids=lambda c: c.name)
def test_a_row_of_the_roster(row):
    assert contestant_of(row.name) is row


@pytest.mark.parametrize(
    ("name", "like"),
    [("adamw/x", "adamw"), ("sgd-momentum/x", "sgd-momentum"), ("adamw+gnp/x", "adamw+gnp"), ("kalman/x", "kalman")],
)
def test_a_label_searches_and_fixes_what_its_row_does(name, like):
    found, row = contestant_of(name), find_contestant(like)
    assert (found.name, found.space, dict(found.fixed)) == (name, row.space, dict(row.fixed))


@pytest.mark.parametrize("name", ["rmsprop", "rmsprop+clip"])
def test_others_search_rate_and_decay(name):
    assert contestant_of(name).space == PLAIN
    assert PLAIN[1] is HORIZON


@pytest.mark.parametrize("name", ["ring+agr", "adamw+clip", "sgd-momentum+sam/x", "kalman+agr", "muon+clip+agr"])
def test_the_regularized_search_as_the_plain_do(name):
    """With what is fixed; but for a row of their own."""
    found, row = contestant_of(name), find_contestant(name.partition("+")[0])
    assert (found.name, found.space, dict(found.fixed)) == (name, row.space, dict(row.fixed))
    assert contestant_of("adamw+sam/x").space == find_contestant("adamw+sam").space


@pytest.mark.parametrize("name", ["sgd", "sophia-h", "sgd+clip"])
def test_spaces_beside_the_roster(name):
    assert contestant_of(name).space[1] is HORIZON
    assert contestant_of(name).space[0] != PLAIN[0]


def test_a_class_of_a_module():
    found = contestant_of("torch.optim:RAdam")
    assert (found.name, found.space) == ("radam", PLAIN)
    optimizer = make_optimizer("radam", nn.Linear(2, 1), lr=0.25)
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.RAdam, 0.25)
    assert contestant_of("torch.optim:RAdam") == found, "once more"
    assert [d.name for d in contestant_of("torch.optim:Rprop").space] == ["lr", "horizon"], "what it takes"
    ours = contestant_of("torch.optim:AdamW")
    assert ours.name == "torch.optim.adamw", "of a name that is taken"
    assert type(make_optimizer(ours.name, nn.Linear(2, 1))) is torch.optim.AdamW


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "beside_us.py").write_text("import torch\n\n\nclass Own(torch.optim.SGD):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    assert contestant_of("beside_us:Own").name == "own"
    assert str(tmp_path) not in sys.path
    sys.modules.pop("beside_us")


def test_who_takes_a_model_and_who_parameters():
    """By the first argument's name or annotation; all else takes parameters."""

    class Own(torch.optim.SGD):
        def __init__(self, parameters, lr=0.1):
            super().__init__(parameters, lr)

    def annotated(what: nn.Module, lr=0.1):
        return torch.optim.SGD(what.parameters(), lr)

    def anything(*arguments, **settings):
        return torch.optim.SGD(*arguments, **settings)

    for build in (Own, annotated, anything, lambda model, lr=0.1: torch.optim.SGD(model.parameters(), lr)):
        register_optimizer("mine", build)
        assert len(make_optimizer("mine", nn.Linear(2, 1), lr=0.3).param_groups[0]["params"]) == 2


def test_a_step_that_has_to_have_a_closure_gets_one():
    register_optimizer("lbfgs", torch.optim.LBFGS)
    model = nn.Linear(2, 1)
    stepper = Stepper(model, make_optimizer("lbfgs", model), lambda model, batch: model(batch).square().mean())
    assert stepper.by_closure


@pytest.mark.parametrize(("text", "count"), [(PARAMS, 2), (MODEL, 1)])
def test_a_file(tmp_path, text, count):
    found = contestant_of(file(tmp_path, text))
    assert (found.name, found.space, found.fixed) == ("mine", PLAIN, {})
    optimizer = make_optimizer("mine+gnp", nn.Linear(2, 1), lr=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == count
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("space", "names"),
    [
        ("{'lr': (1e-4, 1e-1)}", ["lr", "horizon"]),
        ("{'lr': [1e-4, 1], 'a': (1, 2), 'b': (0.5, 3)}", ["lr", "horizon", "a", "b"]),
        ("{}", ["horizon"]),
        ("{'lr': (1e-4, 1e-1), '1-momentum': (0.01, 0.2)}", ["lr", "horizon", "1-momentum"]),
    ],
)
def test_a_space(tmp_path, space, names):
    found = contestant_of(file(tmp_path, f"{PARAMS}SPACE = {space}"))
    assert [d.name for d in found.space] == names
    assert HORIZON in found.space


BAD_SPACES = [
    ("3", r"is 3: write {'lr': \(1e-4, 1e-1\)}"),
    ("['lr']", "write {'lr'"),
    ("{'lr': 3}", "write {'lr'"),
    ("{'lr': (1, 2, 3)}", "write {'lr'"),
    ("{'lr': ('a', 'b')}", "write {'lr'"),
    ("{'lr': (None, 1)}", "write {'lr'"),
    ("{3: (1, 2)}", "write {'lr'|3"),
    ("{'learning rate': (1, 2)}", "learning rate"),
    ("{'horizon': (0.1, 1)}", "horizon"),
    ("{'lr': (1, 1)}", "lr has the bounds 1, 1: give 0 < low < high"),
    ("{'lr': (2, 1)}", "bounds 2, 1"),
    ("{'lr': (0, 1)}", "bounds 0, 1"),
    ("{'lr': (-1, 1)}", "bounds -1, 1"),
    ("{'lr': (float('nan'), 1)}", "bounds nan, 1"),
    ("{'lr': (1, float('inf'))}", "bounds 1, inf"),
    ("{'lr': (1, 2), 'a': (1, 2), 'b': (1, 2), 'c': (1, 2)}", "has 4 dimensions: all search 4, .* keep 3"),
]


@pytest.mark.parametrize(("space", "message"), BAD_SPACES)
def test_bad_spaces(tmp_path, space, message):
    with pytest.raises(InputError, match=message):
        contestant_of(file(tmp_path, f"{PARAMS}SPACE = {space}"))
    assert "mine" not in OPTIMIZERS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.py", "x = 1", "mine.py defines no function `build`: it is called with"),
        ("mine.py", "build = 3", "defines no function `build`"),
        ("mine.py", "def build(", "mine.py cannot be read .SyntaxError"),
        ("mine.py", "1 / 0", "mine.py cannot be read .ZeroDivisionError: division by zero"),
        ("mine.py", "import no_such_package", "cannot be read .ModuleNotFoundError"),
        ("adamw.py", PARAMS, "an optimizer 'adamw' is there already: choose another name"),
        ("Ring.py", PARAMS, "an optimizer 'ring' is there already"),
        ("a+b.py", PARAMS, r"the name 'a\+b' of an optimizer is empty or holds \+ or /"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        contestant_of(file(tmp_path, text, name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package:Thing", "no optimizer 'no_such_package:Thing' .*give MODULE:CLASS, as in torch.optim:RAdam"),
        ("torch.optim:Thing", "no optimizer 'torch.optim:Thing'"),
        (":Thing", "no optimizer ':Thing'"),
        (".mine:Thing", "no optimizer '.mine:Thing'"),
        ("math:pi", "math:pi"),
        ("none.py", "no file 'none.py': give a Python file with a function `build`"),
        ("nothing", "unknown optimizer 'nothing': choose one of ring"),
        ("adamw/ ", "the label of 'adamw/ ' is empty or not printable"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(InputError, match=message):
        contestant_of(name)


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    """They would share their results, and the second would run as both."""
    monkeypatch.setattr(protocol, "find_workload", lambda name: small_workload())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [file(tmp_path / "a", PARAMS), file(tmp_path / "b", MODEL)]
    with pytest.raises(InputError, match="mine"):
        Job(["small"], paths, tmp_path / "out")


@pytest.mark.parametrize("given", ["as it was named", "mine"])
def test_settings_of_a_users_optimizer(tmp_path, monkeypatch, given):
    monkeypatch.setattr(protocol, "find_workload", lambda name: small_workload())
    path = file(tmp_path, PARAMS)
    key = path if given == "as it was named" else given
    found = Job(["small"], [path], tmp_path / "out", settings={key: {"lr": 0.25}}).run(1, False)
    assert found[0].trial["settings"] == {"lr": 0.25}


def test_setting_a_users_optimizer_on_the_command_line(tmp_path):
    path = file(tmp_path, PARAMS)
    common = ("--workload", "digits-mlp", "--budget", "0.005", "--out", str(tmp_path / "out"), "--seeds", "1")
    arguments = ("bench", "run", *common, "--optimizer", path, "--set", f"{path}.lr=0.25")
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exit_code == 0, result.output
    assert Store(tmp_path / "out").outcomes()[0].trial["settings"] == {"lr": 0.25}


def test_the_whole_comparison_with_a_users_file(tmp_path):
    path, out = file(tmp_path, PARAMS + SPACE), tmp_path / "out"
    names = ("--optimizer", f"{path},ring,kfac,adamw", "--workload", "digits-mlp", "--budget", "0.02")

    def call(command, *arguments):
        result = CliRunner().invoke(make_app(), ["bench", command, *arguments, "--out", str(out)])
        assert result.exit_code == 0, result.output
        return result.stdout

    tuned = call("tune", *names, "--studies", "1", "--trials", "2")
    assert "[1/8] digits-mlp, mine, study 0, trial 0: best accuracy " in tuned
    assert "8 runs, 0 failed" in tuned
    ran = call("run", *names, "--seeds", "2")
    assert "[8/8] digits-mlp, adamw, seed 1: best accuracy " in ran
    outcomes = Store(out).outcomes()
    assert len(outcomes) == 16
    own = [o for o in outcomes if o.optimizer == "mine"]
    assert {o.trial["phase"] for o in own} == {"tune", "run"}
    assert all(o.trial["settings"].keys() == {"lr", "damping"} for o in own)
    best = max((o for o in own if o.trial["phase"] == "tune"), key=lambda o: o.best())
    assert all(o.trial["settings"] == best.trial["settings"] for o in own if o.trial["phase"] == "run")
    shown = call("report", "--page", str(tmp_path / "docs" / "page.md"))
    assert str(out / "report.html") in shown
    assert "| mine |" in (out / "results.md").read_text()
    page = (tmp_path / "docs" / "page.md").read_text()
    assert "](../out/figures/curves-digits-mlp.png)" in page
    with (out / "results.csv").open(newline="") as table:
        assert len(list(csv.DictReader(table))) == 16
    line = next(line for line in call("status").splitlines() if "digits-mlp" in line)
    assert line.split() == [
        "digits-mlp",
        "fast",
        "720",
        "accuracy",
        line.split()[4],
        "none",
        "needed",
        "8",
        "8",
        "none",
    ]
