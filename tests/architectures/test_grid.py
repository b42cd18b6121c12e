"""The architecture grid: every row x {ring, kalman} x {hooks, backpack, auto}, held against brute force."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from grng.benchmarks.architectures import ARCHITECTURES, available
from grng.benchmarks.architectures.judge import ENGINES, VARIANTS, disagreements, examine

from grng import GRNG, Curvature
from grng.curvature import DenseStatistics
from grng.update import update_

PEERS = (
    *("mlp", "inplace_relu", "linear_no_bias", "linear_subclass", "residual", "conv2d", "conv2d_groups"),
    *("conv2d_dilation", "conv2d_same_pad", "conv2d_circular", "conv1d", "conv3d", "convT2d", "batchnorm", "layernorm"),
    *("groupnorm", "rmsnorm", "linear_seq", "attention_linears", "transformer_layer", "embedding", "tied_embedding"),
    *("module_called_twice", "lora_frozen_base", "functional_weight", "activation_ckpt", "torch_compile"),
    "bf16_autocast",
)
CELLS = [
    pytest.param(name, variant, engine, B, id=f"{name}-{variant}-{engine}-{B}")
    for name, row in ARCHITECTURES.items()
    for variant in VARIANTS
    for engine in ENGINES
    for B in ((3,) if row.needs else (1, 4))
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_peers_cases_are_there() -> None:
    assert len(PEERS) == 28
    assert set(PEERS) <= ARCHITECTURES.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "variant", "engine", "B"), CELLS)
def test_row(name: str, variant: str, engine: str, B: int) -> None:
    """Every trainable parameter is covered as claimed: exact against brute force, a stated approximation, or the
    visible fallback; each of them is trained, and nothing is silent."""
    row = ARCHITECTURES[name]
    if not available(row):
        pytest.importorskip(row.needs)
    outcome = examine(row, variant, engine, B)
    refusal = row.refusal(engine)
    if refusal:
        assert re.search(refusal, outcome.refused)
        return
    assert outcome.refused == ""
    assert outcome.faults == []
    assert disagreements(row, outcome, variant, engine) == []
    assert outcome.losses[-1] < outcome.losses[0]
    found = [f.words for f in outcome.findings.values() if f.kind == "fallback"]
    failed = any("captured" in words for words in found)  # by the self-check: that is said aloud
    assert bool(outcome.warnings) == failed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_claim_is_about_a_parameter(name: str) -> None:
    row = ARCHITECTURES[name]
    if not available(row):
        pytest.importorskip(row.needs)
    names = [n for n, _ in row.make().named_parameters()]
    patterns = [*row.claims, *(() if isinstance(row.backpack, str) else row.backpack)]
    assert [p for p in patterns if not any(fnmatchcase(n, p) for n in names)] == []


WRONG: dict[str, Any] = {
    "Lambda": ("input_sum", lambda known: lambda s: 1.001 * known(s)),
    "Gamma": ("output_sum", lambda known: lambda s: known(s).roll(1, -1)),
}


@pytest.mark.parametrize("factor", WRONG)
@pytest.mark.parametrize("name", ["mlp", "conv2d_circular", "transformer_layer"])
def test_a_wrong_factor_is_found(name: str, factor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, wrong = WRONG[factor]
    monkeypatch.setattr(DenseStatistics, method, wrong(getattr(DenseStatistics, method)))
    outcome = examine(ARCHITECTURES[name], "ring", "hooks", 4)
    assert disagreements(ARCHITECTURES[name], outcome, "ring", "hooks")


def test_wrong_columns_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    known = DenseStatistics.columns
    monkeypatch.setattr(DenseStatistics, "columns", lambda s, groups=None: known(s, groups and groups - 1))
    with pytest.raises((AssertionError, RuntimeError)):
        test_row("mlp", "kalman", "hooks", 4)


def test_a_parameter_that_is_not_moved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_first = lambda groups, states, g, *rest: update_(groups, states, dict(list(g.items())[1:]), *rest)  # noqa: E731
    monkeypatch.setattr("grng.optimizer.update_", without_the_first)
    outcome = examine(ARCHITECTURES["mlp"], "ring", "hooks", 4)
    assert outcome.faults == ["0.weight has a gradient and was not moved"]


def test_the_error_of_an_operation_in_place_names_the_remedy() -> None:
    """BackPACK's own limit shows in the user's forward pass, where it was asked for; auto keeps away from it."""
    row = ARCHITECTURES["inplace_relu"]
    model = row.make()
    batch = row.batch(model, 3)
    with GRNG(model, curvature=Curvature(capture="backpack")), pytest.raises(RuntimeError, match="inplace") as caught:
        row.value(model, batch)
    assert "use Curvature(capture='auto') or 'hooks'" in caught.value.__notes__[0]
