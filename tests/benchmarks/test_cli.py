"""The command line: exit codes, messages, recipes, silence off a terminal."""

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch
from grng.benchmarks import errors, report
from grng.benchmarks.cli import main, make_app
from grng.benchmarks.config import CompareConfig, parse_settings, read_recipe, resolve_device
from grng.benchmarks.errors import InputError
from grng.benchmarks.progress import Bars
from grng.benchmarks.records import read_runs
from typer.testing import CliRunner

QUICK = ("--optimizers", "sgd-momentum,adamw", "--epochs", "1", "--seeds", "1", "--batch-size", "256")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing takes most of the time of a small job, and test_compare looks at the figures."""
    monkeypatch.setattr(report, "draw_figures", lambda records, target: {})


def call(*arguments: str):
    return CliRunner().invoke(make_app(), [str(a) for a in arguments])


def test_version():
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"grng {version('grng')}\n")


def test_compare_off_a_terminal_prints_one_plain_line_a_run(tmp_path):
    result = call("compare", *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output, "no colours or bars"
    lines = result.stdout.splitlines()
    assert lines[0].startswith("[1/2] sgd-momentum, seed 0: test accuracy ")
    assert lines[1].startswith("[2/2] adamw, seed 0: test accuracy ")
    assert all(sum(line.split()[:1] == [name] for line in lines[2:]) == 1 for name in ("sgd-momentum", "adamw"))
    assert result.stderr == ""
    again = call("compare", *QUICK, "--out", tmp_path / "out", "--resume")
    assert again.exit_code == 0
    assert again.stdout.startswith("skipping 2 of 2 runs")


def test_a_failed_run_makes_the_exit_code_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: 1 / 0)
    result = call("compare", *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "[2/2] adamw, seed 0: failed, ZeroDivisionError" in result.stdout
    assert "1 failed" in result.stdout


BAD = [
    (("--optimizers", "adamw,foo"), "unknown optimizer 'foo': choose one of ring, reng"),
    (("--model", "resnet"), "unknown model 'resnet': choose one of mlp, cnn, transformer"),
    (("--device", "tpu"), "unknown device 'tpu': choose one of cpu, cuda, auto"),
    (("--device", "cuda:99"), "device 'cuda:99' is not there"),
    (("--lr-schedule", "step"), "unknown lr-schedule 'step': choose one of cosine, constant"),
    (("--epochs", "-3"), "epochs is -3: give a whole number of 1 or more"),
    (("--seeds", "0"), "seeds is 0: give"),
    (("--batch-size", "0"), "batch-size is 0: give"),
    (("--threads", "0"), "threads is 0: give"),
    (("--target", "97"), "target is 97.0: give an accuracy between 0 and 1"),
    (("--set", "adamw.lr"), "--set 'adamw.lr' is malformed: write OPTIMIZER.key=value"),
    (("--set", "lr=1"), "--set 'lr=1' is malformed"),
    (("--set", "foo.lr=1"), "unknown optimizer 'foo'"),
    (("--set", "rmsprop.lr=1"), "settings for 'rmsprop', which takes no part: choose sgd-momentum, adamw"),
    (("--set", "adamw.learning=1"), "optimizer 'adamw' cannot be built with learning=1"),
    (("--set", "adamw.lr=-1"), "optimizer 'adamw' cannot be built with lr=-1: Invalid learning rate: -1"),
    (("--data", "no/such/folder"), "no data at 'no/such/folder': give 'digits', a folder"),
    (("--recipe", "none.toml"), "recipe none.toml cannot be read"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_line_and_exit_code_two(tmp_path, arguments, message):
    result = call("compare", *QUICK, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"grng compare: error: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "out").exists(), "nothing has run"


def test_no_optimizer_is_refused():
    result = call("compare", "--optimizers", ",")
    assert (result.exit_code, result.stderr.split(":")[2]) == (2, " no optimizer given")


def test_bad_folders(tmp_path):
    (tmp_path / "file").write_text("")
    result = call("compare", *QUICK, "--out", tmp_path / "file")
    assert (result.exit_code, "cannot write to the folder" in result.stderr) == (2, True)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text("{}")
    result = call("compare", *QUICK, "--out", tmp_path / "old")
    assert (result.exit_code, "holds a previous result: give --resume" in result.stderr) == (2, True)


def test_an_empty_or_foreign_folder_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert call("compare", *QUICK, "--out", tmp_path).exit_code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_recipe_gives_options_and_the_command_line_overrides_them(tmp_path):
    recipe = tmp_path / "job.toml"
    recipe.write_text(
        'optimizers = ["sgd", "adamw"]\nepochs = 2\nseeds = 1\nbatch-size = 256\n'
        "[settings.sgd]\nlr = 0.3\nnesterov = true\nmomentum = 0.5\n"
    )
    result = call("compare", "--recipe", recipe, "--epochs", "1", "--set", "sgd.lr=0.2", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    runs = {r.optimizer: r for r in read_runs(tmp_path / "out")}
    assert set(runs) == {"sgd", "adamw"}
    assert runs["sgd"].given == {"lr": 0.2, "nesterov": True, "momentum": 0.5}
    assert (runs["sgd"].config["epochs"], runs["sgd"].config["batch_size"]) == (1, 256)
    again = call("compare", "--recipe", recipe, "--epochs", "1", "--optimizers", "adamw", "--out", tmp_path / "one")
    assert again.exit_code == 0, again.output  # the table of an optimizer that is left out goes with it
    assert {r.optimizer for r in read_runs(tmp_path / "one")} == {"adamw"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs =", "cannot be read"),
        ("epoch = 3", "'epoch': choose one of data, model"),
        ("epochs = 'many'", "epochs is 'many', of the wrong type"),
        ("[settings]\nring = 3", r"write a table \[settings.ring\]"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / "job.toml")


def test_settings_are_literals_or_text():
    pairs = ["ring.rho=1e-3", "adamw.betas=(0.8, 0.9)", "reng.mode=finite", "sgd.nesterov=True", "ring.lr=a=b"]
    assert parse_settings(pairs) == {
        "ring": {"rho": 1e-3, "lr": "a=b"},
        "adamw": {"betas": (0.8, 0.9)},
        "reng": {"mode": "finite"},
        "sgd": {"nesterov": True},
    }


def test_the_device_is_found():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_config_is_checked_in_python_too():
    options: dict[str, Any] = {"epochs": 2.5}
    with pytest.raises(InputError, match=r"epochs is 2\.5"):
        CompareConfig(**options)


def test_bars_show_the_runs_and_the_lines(capsys, tmp_path):
    result = call("compare", *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 0
    with Bars() as bars:
        bars.begin(2, 0, 1)
        for record in read_runs(tmp_path / "out"):
            bars.run_begins(record)
            bars.epoch_ended(1)
            bars.run_ended(record)
        assert [(task.completed, task.total) for task in bars.progress.tasks] == [(2, 2), (1, 1)]
    assert "[2/2] sgd-momentum, seed 0: test accuracy" in capsys.readouterr().out


def test_missing_packages_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name in ("rich", "sklearn") else object())
    with pytest.raises(SystemExit, match=r"need rich, sklearn: pip install 'grng\[bench\]'"):
        main()


def test_nothing_heavy_is_imported_before_it_is_used():
    code = (
        "import sys, grng.benchmarks, grng.baselines, grng.benchmarks.cli; print([m for m in {} if m in sys.modules])"
    )
    heavy = ["typer", "rich", "matplotlib", "jinja2", "sklearn"]
    done = subprocess.run([sys.executable, "-c", code.format(heavy)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
