"""`grng.check` and `grng check`: verdicts, properties and exit codes, on models that are right and on wrong ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grng.benchmarks.cli import make_app
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import grng.invariance
from grng import GRNG, Curvature, check
from grng.curvature import DenseStatistics
from grng.update import update_


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double()


def data(B: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(B, 4).double(), torch.randint(3, (B,))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def state(model: nn.Module) -> dict[str, Any]:
    found = {**model.state_dict(), **{f"gradient {n}": p.grad for n, p in model.named_parameters()}}
    return {name: None if t is None else t.clone() for name, t in found.items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    pairs = [(a[name], b[name]) for name in a.keys() | b.keys()]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def test_a_model_is_verified_and_put_back() -> None:
    model, batch = mlp(nn.BatchNorm1d(6)), data()
    loss(model, batch).backward()
    before, numbers = state(model), torch.get_rng_state()
    found = check(model, batch, loss)
    assert found.ok
    assert {v.treatment for v in found.verdicts} == {"verified"}
    assert len(found.verdicts) == 2 * len(list(model.parameters()))
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), numbers)
    GRNG(model).close()  # nothing is attached any more


@pytest.mark.parametrize("variant", ["ring", "kfac", "ekfac", "kalman", "reng"])
def test_properties_hold(variant: str) -> None:
    found = check(mlp(), data(), loss, variants=[variant])
    held = {p.name: p.holds for p in found.properties}
    assert held.pop(f"micro-batches, {variant}") is (None if variant == "reng" else True)  # mode "double" refuses them
    assert set(held.values()) == {True}
    assert (f"duplicated batch, {variant}" in held) is (variant != "kalman")  # copies are evidence to the filter


def test_what_gives_no_occasion_is_said() -> None:
    coupled = check(mlp(nn.BatchNorm1d(6)), data(), loss, variants=["ring"])
    assert [p.holds for p in coupled.properties] == [True, True, True, None]
    assert "samples see each other" in coupled.properties[-1].reason
    torch.manual_seed(0)
    random = check(mlp(nn.Dropout(0.5)), data(), loss, variants=["ring"])
    # From one seed the parts draw what the whole does, one after the other; copies draw numbers of their own.
    assert [p.holds for p in random.properties] == [True, True, None, True]
    one = check(mlp(), data(1), loss, variants=["ring"])
    assert [p.holds for p in one.properties[2:]] == [None]
    assert all(found.ok for found in (coupled, random, one))


def test_fallback_and_diagonal_are_told_apart() -> None:
    found = check(mlp(nn.PReLU(6)), data(), loss)
    treatment = {(v.parameter, v.variant): v.treatment for v in found.verdicts}
    assert treatment["1.weight", "ring"] == "fallback"
    assert treatment["1.weight", "kalman"] == "approximation"
    assert found.counts() == {"verified": 8, "approximation": 1, "fallback": 1, "unused": 0, "wrong": 0}
    assert found.ok


def test_a_parameter_without_a_gradient_is_unused() -> None:
    model = mlp()
    model.register_parameter("spare", nn.Parameter(torch.ones(2).double()))
    found = check(model, data(), loss, variants=["ring"])
    assert [v.treatment for v in found.verdicts if v.parameter == "spare"] == ["unused"]
    assert found.ok


class Nan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


def in_part(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    h = batch[0]
    for module in model:
        h = module(h)
    return cross_entropy(h, batch[1])


WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], str]] = {
    "fed through a part only": (mlp, in_part, "does not call the model that is checked"),
    "NaN": (lambda: mlp(Nan()), loss, "the loss is not finite: nan"),
    "infinite": (mlp, lambda m, b: loss(m, b) * torch.inf, "the loss is not finite: inf"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_model_is_found(case: str) -> None:
    build, its_loss, reason = WRONG[case]
    model = build()
    before = state(model)
    found = check(model, data(), its_loss)
    assert not found.ok
    assert {v.treatment for v in found.verdicts} == {"wrong"}
    assert all(reason in v.reason for v in found.verdicts)
    assert "NOT OK" in str(found)
    assert same(state(model), before)


def test_a_parameter_that_is_not_moved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_first = lambda groups, states, g, *rest: update_(groups, states, dict(list(g.items())[1:]), *rest)  # noqa: E731
    monkeypatch.setattr("grng.optimizer.update_", without_the_first)
    found = check(mlp(), data(), loss, variants=["ring"])
    assert [(v.parameter, v.reason) for v in found.verdicts if v.treatment == "wrong"] == [
        ("0.weight", "it has a gradient and was not moved")
    ]


def test_a_curvature_that_depends_on_the_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    known = DenseStatistics.output_sum
    monkeypatch.setattr(DenseStatistics, "output_sum", lambda s: known(s) * s.samples)
    found = check(mlp(), data(), loss, variants=["kfac"], curvature=Curvature(damping=1e-3, kl_clip=None))
    assert {p.name: p.holds for p in found.properties} == {
        "attaching changes nothing": True,
        "closing leaves nothing behind": True,
        "duplicated batch, kfac": False,
        "micro-batches, kfac": False,
    }
    assert not found.ok


def test_a_hook_that_is_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRNG, "close", lambda self: None)
    model = mlp()
    kept = []
    monkeypatch.setattr(grng.invariance, "GRNG", lambda *a, **k: kept.append(GRNG(*a, **k)) or kept[-1])
    (_, closing) = grng.invariance.attaching(model, data(), loss, "ring", Curvature())
    assert closing.holds is False
    assert "._forward_hooks" in closing.reason
    for optimizer in kept:
        optimizer._finalizer()


def test_an_attachment_that_draws_random_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from grng.curvature import Capture

    known = Capture._enter
    monkeypatch.setattr(Capture, "_enter", lambda self, *args: (torch.rand(1), known(self, *args))[1])
    (attaching, _) = grng.invariance.attaching(mlp(), data(), loss, "ring", Curvature())
    assert (attaching.holds, attaching.reason) == (False, "random numbers")


def test_without_a_loss_labels_are_random() -> None:
    assert check(mlp(), torch.randn(6, 4).double()).ok
    scalar = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    assert check(scalar, torch.randn(6, 4)).ok
    with pytest.raises(ValueError, match=r"loss must be given for a model that returns no tensor with a graph"):
        check(mlp().requires_grad_(False), torch.randn(6, 4).double())


# The command.

FILE = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, (torch.randn(6, 4), torch.randint(3, (6,))), lambda m, b: cross_entropy(m(b[0]), b[1])

def alone():
    return made()[0]

def part():
    model, batch, loss = made()
    return model, batch, lambda m, b: loss(m[2], (torch.randn(6, 6), b[1]))

def nothing():
    return 3

number = 3

def asks(size):
    return nn.Linear(size, 3)

def swapped():
    model, batch, loss = made()
    return model, batch, lambda b, m: loss(m, b)

def number_loss():
    model, batch, loss = made()
    return model, batch, lambda m, b: 3.0
"""


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(make_app(), ["check", *map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_model_in_a_file(file: Path) -> None:
    result = call(f"{file}:made")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("ok: 8 verified, 0 approximation, 0 fallback, 0 unused, 0 wrong")
    assert "\x1b" not in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["0.weight"]]
    assert rows == [["0.weight", "6x4", "backpack", "verified", "verified", "Linear"]]


def test_a_model_alone_takes_a_shape(file: Path) -> None:
    assert call(f"{file}:alone", "--input", "6,4").exit_code == 0
    assert call(f"{file}:alone", "--input", "6x4", "--variants", "ekfac", "--capture", "hooks").exit_code == 0


def test_a_module_by_name() -> None:
    result = call("torch.nn:Identity", "--input", "3,4")
    assert result.exit_code == 2
    assert "no tensor with a graph" in result.stderr


def test_a_wrong_model_ends_with_one(file: Path) -> None:
    result = call(f"{file}:part")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("NOT OK: 0 verified")
    assert "does not call the model that is checked" in " ".join(result.stdout.split())


@pytest.mark.parametrize("row", ["mlp", "multihead_attention", "tied_embedding"])
def test_a_row_of_the_grid(row: str) -> None:
    assert call(row).exit_code == 0


def test_a_language_model_from_its_configuration(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaConfig(**small, hidden_size=16, intermediate_size=32).save_pretrained(tmp_path)
    for shape in ((), ("--input", "3,9")):
        result = call(f"transformers:{tmp_path}", *shape)
        assert result.exit_code == 0, result.output
        assert "ok: 24 verified, 0 approximation, 0 fallback" in result.stdout.splitlines()[-1]


BAD = [
    ((), "no MODEL: give MODULE:CALLABLE"),
    (("nothing",), "no model 'nothing': give MODULE:CALLABLE, FILE.py:CALLABLE, timm:NAME, or one of mlp, "),
    (("no.such:thing",), "no model 'no.such:thing': No module named 'no'"),
    (("torch.nn:Nothing",), "no model 'torch.nn:Nothing': module 'torch.nn' has no attribute 'Nothing'"),
    (("absent.py:made",), "no file 'absent.py'"),
    (("FILE:alone",), "returns a model alone: add --input SHAPE"),
    (("FILE:alone", "--input", "6,x"), "--input '6,x' is no shape: write sizes"),
    (("FILE:alone", "--input", "0,4"), "--input '0,4' is no shape: write sizes"),
    (("FILE:nothing",), "returns int: give a model, or (model, inputs, loss(model, inputs))"),
    (("FILE:number",), "is 3, which cannot be called: give a function that returns the model"),
    (("FILE:asks",), "called without arguments, raises TypeError: asks() missing 1 required positional argument"),
    (("FILE:swapped",), "fails without GRNG too: loss(model, inputs) raises TypeError in FILE, line"),
    (("FILE:number_loss",), "raises TypeError: the loss must be a scalar tensor with a graph, but is: 3.0"),
    (("FILE:alone", "--input", "6,5"), "fails without GRNG too: model(inputs) raises RuntimeError: mat1 and mat2"),
    (("mlp", "--variants", "rong"), "unknown variant 'rong': choose one of ring, reng"),
    (("mlp", "--capture", "none"), "unknown capture 'none': choose one of auto"),
    (("--grid", "--page", "page.md"), "--page needs --out"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_refused(arguments: tuple[str, ...], message: str, file: Path) -> None:
    result = call(*(a.replace("FILE", str(file)) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr.replace(str(file), "FILE")


@pytest.mark.parametrize(("variants", "message"), [((), "at least one variant"), ("rung", "unknown variant 'rung'")])
def test_variants_are_refused(variants: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(mlp(), data(), loss, variants=variants)


def test_one_variant_by_its_name() -> None:
    assert list(check(mlp(), data(), loss, variants="kfac").reports) == ["kfac"]
