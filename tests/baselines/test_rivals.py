"""Doors to other libraries: what is said where one is missing, and how those that are there are driven.

The libraries are stand-ins put into sys.modules; the real ones are tried by hand.
"""

import copy
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from grng.baselines import OPTIMIZERS, make_optimizer, parts_of
from grng.baselines.rivals import RIVALS, available_rivals
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng.regularizers import GNP, Regularized

OF_PARAMETERS = ["rival-adan", "rival-soap", "rival-shampoo", "rival-psgd", "rival-heavyball-soap"]


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """Rivals that a test names leave the table with it."""
    before = dict(OPTIMIZERS)
    yield
    OPTIMIZERS.clear()
    OPTIMIZERS.update(before)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """The module `name`, and empty packages around it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in members.items():
        setattr(module, key, value)
    return module


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def closure_of(model: nn.Module, optimizer: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


class Hooked(torch.optim.SGD):
    """Like SINGD: a hook on every Linear, whose parameters alone it trains; a step without a closure; own state."""

    def __init__(self, model: nn.Module, lr: float = 0.5, warn_unsupported: bool = True) -> None:
        assert not warn_unsupported, "what is left alone goes to AdamW"
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        super().__init__([p for layer in layers for p in layer.parameters()], lr=lr)
        self.seen = 0
        for layer in layers:
            layer.register_forward_hook(self.look)

    def look(self, *_: Any) -> None:
        self.seen += 1

    def step(self, closure: Any = None) -> None:
        assert closure is None
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict.pop("seen")
        super().load_state_dict(state_dict)


class Halving:
    """Like kfac-pytorch's preconditioner: hooks without handles, a rate that it asks for; here it halves gradients."""

    def __init__(self, model: nn.Module, *, lr: Any, damping: float = 0.0) -> None:
        self.model, self.lr, self.damping, self.rates = model, lr, damping, []
        model[0].register_forward_pre_hook(lambda module, args: None)  # type: ignore[index]
        model[0].register_full_backward_hook(lambda module, before, after: None)  # type: ignore[index]

    def step(self) -> None:
        self.rates.append(self.lr(len(self.rates)))
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad.mul_(0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rates = state_dict["rates"]


class Twice(torch.optim.SGD):
    """Like SophiaH: on every third step the gradients have to have a graph."""

    update_period = 3

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.graphs: list[bool] = []

    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        self.graphs.append(group["params"][0].grad.grad_fn is not None)
        group["step"] = group.get("step", 0) + 1
        super().step()


@pytest.mark.parametrize("name", RIVALS)
def test_a_missing_library_is_named_with_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = RIVALS[name].library
    monkeypatch.setitem(sys.modules, library.module, None)
    monkeypatch.setitem(sys.modules, library.module.partition(".")[0], None)
    with pytest.raises(ImportError, match=rf"{library.module} cannot be imported .*: .*install"):
        make_optimizer(name, net())
    assert name not in available_rivals()


def test_a_library_of_the_same_name_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """kfac on the package index has no preconditioner of this kind."""
    stand_in(monkeypatch, "kfac")
    monkeypatch.delitem(sys.modules, "kfac.preconditioner", raising=False)
    assert "rival-kfac-pytorch" not in available_rivals()
    with pytest.raises(ImportError, match="another library"):
        make_optimizer("rival-kfac-pytorch", net())


def test_those_that_are_there_are_available_and_enter_the_table_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "singd.optim.optimizer", SINGD=Hooked)
    assert "rival-singd" in available_rivals()
    assert not any(name.startswith("rival-") for name in OPTIMIZERS)
    assert parts_of("rival-singd+agr") == ("rival-singd", ("agr",))
    assert OPTIMIZERS["rival-singd"].about == RIVALS["rival-singd"].about
    assert not OPTIMIZERS["rival-singd"].own
    with pytest.raises(ValueError, match=r"unknown optimizer 'rival-sing'.* Did you mean 'rival-singd'\?"):
        make_optimizer("rival-sing", net())


@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_an_optimizer_of_parameters_is_the_librarys_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Any_(torch.optim.SGD):
        def __init__(self, params: Any, **settings: Any) -> None:
            made.append(settings)
            super().__init__(params)

    members = dict.fromkeys(("Adan", "SOAP", "ScalableShampoo", "Kron", "PSGDKron"), Any_)
    library = stand_in(monkeypatch, RIVALS[name].library.module, **members)
    library.utils = ModuleType("utils")  # type: ignore[attr-defined]
    library.utils.compile_mode = "on"  # type: ignore[attr-defined]
    model = net()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(name, model, lr=0.1)
    assert type(optimizer) is Any_
    assert made == [{"lr": 0.1}]
    assert len(optimizer.param_groups[0]["params"]) == 4, "frozen parameters are left out"
    assert (library.utils.compile_mode is None) == (name == "rival-heavyball-soap")  # type: ignore[attr-defined]


def test_heavyball_compiles_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    library = stand_in(monkeypatch, "heavyball", SOAP=torch.optim.SGD)
    make_optimizer("rival-heavyball-soap", net(), compile=True)
    assert not hasattr(library, "utils")


def test_singd_has_adamw_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter is trained by one of the two; the closure is ours, schedules reach both, and hooks go."""
    stand_in(monkeypatch, "singd.optim.optimizer", SINGD=Hooked)
    model, other = net(), net()
    optimizer: Any = make_optimizer("rival-singd", model, lr=0.1, beside={"lr": 0.01, "weight_decay": 0.2})
    sgd = torch.optim.SGD([*other[0].parameters(), *other[3].parameters()], lr=0.1)
    adamw = torch.optim.AdamW(other[1].parameters(), lr=0.01, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for t in range(3):
        for part in (sgd, adamw):
            for group in part.param_groups:
                group["lr"] = (0.1 if part is sgd else 0.01) * 0.5**t
        loss = optimizer.step(closure_of(model, optimizer))
        assert torch.equal(loss, closure_of(other, other)())
        sgd.step()
        adamw.step()
        schedule.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    seen = optimizer.parts[0].seen
    assert seen == 6
    with optimizer.paused():
        model(torch.ones(1, 4))
    assert optimizer.parts[0].seen == seen
    optimizer.close()
    model(torch.ones(1, 4))
    assert optimizer.parts[0].seen == seen
    assert hooks_on(model) == 0
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)


def test_a_model_that_singd_covers_has_nothing_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "singd.optim.optimizer", SINGD=Hooked)
    optimizer: Any = make_optimizer("rival-singd", nn.Sequential(nn.Linear(2, 2)))
    assert [type(part) for part in optimizer.parts] == [Hooked]


def test_hooks_go_with_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "singd.optim.optimizer", SINGD=Hooked)
    model = net()
    handle = model[0].register_forward_hook(lambda *_: None)
    optimizer = make_optimizer("rival-singd", model)
    assert hooks_on(model) == 3
    del optimizer
    assert hooks_on(model) == 1, "those of others stay"
    handle.remove()


def test_kfac_pytorch_preconditions_before_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "kfac.preconditioner", KFACPreconditioner=Halving)
    model, other = net(), net()
    optimizer: Any = make_optimizer("rival-kfac-pytorch", model, lr=0.2, weight_decay=0.1, damping=0.3)
    assert optimizer.first.damping == 0.3
    sgd = torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for t in range(3):
        optimizer.step(closure_of(model, optimizer))
        closure_of(other, other)()
        for q in other.parameters():
            q.grad.mul_(0.5)  # type: ignore[union-attr]
        sgd.param_groups[0]["lr"] = 0.2 * 0.5**t
        sgd.step()
        schedule.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert optimizer.first.rates == [0.2, 0.1, 0.05]
    assert hooks_on(model) == 2
    optimizer.close()
    assert hooks_on(model) == 0


def test_gradients_have_a_graph_where_they_are_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "pytorch_optimizer", SophiaH=Twice)
    model = net()
    optimizer: Any = make_optimizer("rival-sophia-h", model)
    losses = [optimizer.step(closure_of(model, optimizer)) for _ in range(5)]
    assert optimizer.parts[0].graphs == [True, False, False, True, False]
    assert all(p.grad is not None and p.grad.grad_fn is None for p in model.parameters())
    assert losses[-1] < losses[0]
    assert optimizer.requires_closure
    with pytest.raises(RuntimeError, match="Twice differentiates gradients: give step"):
        optimizer.step()


@pytest.mark.parametrize("name", ["rival-singd", "rival-kfac-pytorch", "rival-sophia-h"])
def test_resume(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "singd.optim.optimizer", SINGD=Hooked)
    stand_in(monkeypatch, "kfac.preconditioner", KFACPreconditioner=Halving)
    stand_in(monkeypatch, "pytorch_optimizer", SophiaH=Twice)

    def run(model: nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(closure_of(model, optimizer))

    whole, first, second = net(), net(), net()
    run(whole, make_optimizer(name, whole), 5)
    stopped, resumed = make_optimizer(name, first), make_optimizer(name, second)
    run(first, stopped, 2)
    second.load_state_dict(first.state_dict())
    saved = stopped.state_dict()
    for _ in range(2):  # a checkpoint can be loaded again
        resumed.load_state_dict(saved)
    run(second, resumed, 3)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


def test_further_passes_of_a_regularizer_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "singd.optim.optimizer", SINGD=Hooked)
    model = net()
    optimizer: Any = make_optimizer("rival-singd+gnp", model, gnp={"r": 0.1})
    assert isinstance(optimizer, Regularized)
    assert list(optimizer.regularizers) == [GNP(r=0.1)]
    optimizer.step(closure_of(model, optimizer))
    assert optimizer.base.parts[0].seen == 2, "one pass, two layers"


def test_a_checkpoint_under_a_regularizer_holds_both(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "singd.optim.optimizer", SINGD=Hooked)
    first, second = net(), net()
    stopped, resumed = (make_optimizer("rival-singd+gnp", model, gnp={"r": 0.1}) for model in (first, second))
    for _ in range(3):
        stopped.step(closure_of(first, stopped))
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    assert resumed._front.t == 3  # type: ignore[attr-defined]
    for model, optimizer in ((first, stopped), (second, resumed)):
        optimizer.step(closure_of(model, optimizer))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_groups_cannot_be_added_to_a_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would never move them."""
    stand_in(monkeypatch, "singd.optim.optimizer", SINGD=Hooked)
    optimizer = make_optimizer("rival-singd", net())
    with pytest.raises(RuntimeError, match=r"cannot be added to a rival.*build it anew"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
