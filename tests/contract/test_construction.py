"""Constructors, their errors, param groups and names: every optimizer by torch's own description of one."""

import pytest
import torch
from grng.baselines import OPTIMIZERS
from torch import nn

from grng.regularizers import REGULARIZERS

from .cases import (
    ALL,
    DOORS,
    NAN,
    Contract,
    Run,
    TestCase,
    batches,
    close,
    contracts,
    instantiate_device_type_tests,
    network,
    parametrize,
)


def test_every_public_optimizer_has_a_row() -> None:
    names = {info.name for info in ALL}
    assert len(names) == len(ALL)
    assert {name for name, entry in OPTIMIZERS.items() if entry.own} == DOORS.keys()
    assert set(DOORS.values()) <= names
    rules = [name.replace("-", "_") for name in REGULARIZERS]
    assert {f"Regularized_{base}_{rule}" for base in ("SGD", "AdamW") for rule in rules} <= names


class TestConstruction(TestCase):
    @contracts()
    def test_errors(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Those that torch asks of all optimizers, and settings out of range; the message has the value."""
        for error in optim_info.optim_error_inputs_func(device, dtype):
            given = error.optimizer_error_input
            model = network(dtype)
            params = model.parameters() if given.params is None else given.params
            catch = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
            with catch(error.error_type, match=error.error_regex):
                optim_info.optim_cls(params, **given.kwargs)

    @contracts(where=lambda info: not info.supports_complex)
    def test_complex_parameters_are_refused(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """torch's own take them as pairs of real numbers."""
        weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
        with pytest.raises(ValueError, match=r"real and floating-point.*complex64"):
            optim_info.optim_cls([weight])

    @contracts()
    def test_repr(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """The class, and every setting of every group."""
        run = Run(optim_info)
        found = repr(run.optimizer)
        assert found.startswith(type(run.optimizer).__name__)
        for group in run.groups:
            assert all(f"{name}: {value}" in found for name, value in group.items())

    @contracts()
    def test_settings_of_a_group(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """A group with lr 0 stays, weight decay notwithstanding; the other one moves."""
        run = Run.grouped(optim_info, {"lr": 0.0, "weight_decay": 0.3}, {"weight_decay": 0.3})
        held = [[p.detach().clone() for p in group["params"]] for group in run.optimizer.param_groups]
        run.steps(batches(3))
        for i, group in enumerate(run.optimizer.param_groups):
            same = [torch.equal(p, before) for p, before in zip(group["params"], held[i], strict=True)]
            assert same == [i == 0] * len(same)

    @contracts()
    def test_weight_decay_of_a_group(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """In the first two steps it shrinks its group and leaves the other alone."""
        ends = []
        for decay in (0.0, 0.5):
            run = Run.grouped(optim_info, {"weight_decay": decay}, {"weight_decay": 0.0})
            # SOAP's first step only looks; and one step later the gradients differ.
            for _ in range(2 if optim_info.name.endswith(("SOAP", "SOAP_gnp")) else 1):
                run.steps(batches(1))
            ends.append([torch.cat([p.detach().flatten() for p in g["params"]]) for g in run.optimizer.param_groups])
        (plain, other), (decayed, same) = ends
        assert decayed.norm() < plain.norm()
        assert torch.equal(same, other)

    @contracts()
    def test_group_added_later(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """It trains as if it had been there, or where curvature is measured by the fallback; what reads its groups off
        the model refuses, and stays as it was; so does everything where the group's settings are wrong."""
        later = Run(optim_info, params=lambda model: model[:3].parameters() if optim_info.adds else model.parameters())
        before, added = later.groups, {"params": list(later.model[3:].parameters()), "lr": 0.003}
        if not optim_info.adds:
            with pytest.raises(RuntimeError, match=r"cannot be added"):
                later.optimizer.add_param_group(added)
            assert later.groups == before
            return
        if optim_info.exact:
            with pytest.raises(ValueError, match=r"lr must be a finite number >= 0.*nan"):
                later.optimizer.add_param_group({**added, "lr": NAN})
            assert later.groups == before
        later.optimizer.add_param_group(added)
        both = Run.grouped(optim_info, {}, {"lr": 0.003})
        start = later.vector
        for run in (both, later):
            run.steps(batches(3))
        if optim_info.attached:
            assert not (later.vector == start).any()
        else:
            assert torch.equal(both.vector, later.vector)

    @parametrize("dims", [0, 1])
    @contracts()
    def test_tensor_lr(self, device: str, dtype: torch.dtype, optim_info: Contract, dims: int) -> None:
        """A tensor of one element is a number; a scheduler fills it anew."""
        ends = []
        for lr in (0.01, torch.full((1,) * dims, 0.01, dtype=torch.float64)):
            run = Run(optim_info, lr=lr)
            schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
            for batch in batches(3):
                run.steps([batch])
                schedule.step()
            assert type(run.optimizer.param_groups[0]["lr"]) is type(lr)
            ends.append(run.vector)
        assert close(ends[0], ends[1])

    @contracts(where=lambda info: info.supports_param_groups)
    def test_named_parameters(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """(name, tensor) pairs train as the tensors do; the names go into the checkpoint and survive one without."""
        plain, named = Run(optim_info), Run(optim_info, params=lambda model: model.named_parameters())
        names = [name for name, _ in plain.model.named_parameters()]
        for run in (plain, named):
            run.steps(batches(2))
        assert torch.equal(plain.vector, named.vector)
        saved = [run.optimizer.state_dict() for run in (plain, named)]
        assert [state["param_groups"][0].get("param_names") for state in saved] == [None, names]
        for state in saved:
            other = Run(optim_info, params=lambda model: model.named_parameters())
            other.optimizer.load_state_dict(state)
            assert other.optimizer.param_groups[0]["param_names"] == names
        plain.optimizer.load_state_dict(saved[1])
        assert plain.optimizer.param_groups[0]["param_names"] == names

    @contracts(torch.float32, torch.bfloat16)
    def test_precisions(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Parameters train in their own dtype."""
        run = Run(optim_info, dtype)
        start = run.vector
        losses = run.steps(batches(1, dtype, B=6) * 5)
        assert {p.dtype for p in run.model.parameters()} == {dtype}
        assert run.vector.isfinite().all()
        assert not torch.equal(run.vector, start)
        assert losses[-1] < losses[0]


instantiate_device_type_tests(TestConstruction, globals(), only_for="cpu")
