"""A run that was saved and resumed equals one that was not, to the bit, at every phase between refreshes."""

import io
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from grng import GRNG, Curvature, GRNGWarning

from .cases import METHODS, Method, Transformer, cnn, methods, mixed, mlp, stream, tensors_of, train, vector

STEPS = 8
# burn_in, and after how many steps to stop.
SCHEDULES = {"plain": (0, range(STEPS)), "burn-in": (5, range(1, STEPS, 2))}


def text_stream(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(7, (steps, 5, 6), generator=generator)
    return [(t, t[:, 0]) for t in tokens]


def image_stream(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(steps, 6, 1, 6, 6, generator=generator)
    return [(x, torch.randint(3, (6,), generator=generator)) for x in images]


class Run:
    """A model, its optimizer and its learning-rate schedule."""

    def __init__(self, method: Method, model: nn.Module, **options: Any) -> None:
        self.model = model
        self.optimizer = method(model, momentum=0.5, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    def steps(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        for batch in batches:
            train(self.optimizer, self.model, [batch])
            self.schedule.step()

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(saved[name])


def assert_same(resumed: Run, straight: Run) -> None:
    assert torch.equal(vector(resumed.model), vector(straight.model))
    mine, theirs = tensors_of(resumed.optimizer), tensors_of(straight.optimizer)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different
    assert all(mine[name].dtype == theirs[name].dtype for name in mine)
    rates = [group["lr"] for run in (resumed, straight) for group in run.optimizer.param_groups]
    assert len(set(rates)) == 1


def check(method: Method, build: Any, batches: list[tuple[Tensor, Tensor]], phases: range, **options: Any) -> None:
    """Stop after k steps and resume in a fresh run with another initialisation; and go back to k in the same run."""
    straight, saved = Run(method, build(), **options), {}
    start = vector(straight.model)
    for k, batch in enumerate(batches):
        saved[k] = straight.save()
        straight.steps([batch])
    assert not torch.equal(vector(straight.model), start)
    rewound = Run(method, build(), **options)
    rewound.steps(batches)
    for k in phases:
        resumed = Run(method, build(seed=k + 9), **options)
        for run in (resumed, rewound) if k % 3 == 0 else (resumed,):
            run.load(saved[k])
            run.steps(batches[k:])
            assert_same(run, straight)


@pytest.mark.parametrize("schedule", SCHEDULES)
@methods()
def test_resume(method: Method, schedule: str) -> None:
    burn_in, phases = SCHEDULES[schedule]
    curvature = Curvature(stats_every=3, inverse_every=6, burn_in=burn_in)
    batches = stream(STEPS, dtype=torch.float32)
    check(method, lambda seed=1: mixed(torch.float32, seed), batches, phases, curvature=curvature)


@methods("ring", "kalman-vd", "ekfac", "reng-finite")
def test_resume_convolutions_and_batchnorm(method: Method) -> None:
    curvature = Curvature(stats_every=2, inverse_every=4, burn_in=1)
    check(method, lambda seed=1: cnn(seed=seed), image_stream(5), range(5), curvature=curvature)


@methods("ring", "ring-newton", "kalman-fd", "ekfac")
def test_resume_embeddings(method: Method) -> None:
    def build(seed: int = 1) -> nn.Module:
        torch.manual_seed(seed)
        return Transformer()

    check(method, build, text_stream(5), range(5), curvature=Curvature(stats_every=2, burn_in=0))


@methods("ring", "kalman-vd", "ekfac", "ring-newton", "reng-finite")
def test_bfloat16_keeps_float32_state(method: Method) -> None:
    """torch casts a loaded state to the parameter's dtype; factors, momentum and averages must come back as saved."""

    def build(seed: int = 1) -> nn.Module:
        return mixed(torch.bfloat16, seed)

    batches = stream(4, dtype=torch.bfloat16)
    check(method, build, batches, range(4), curvature=Curvature(stats_every=2, burn_in=0))
    run = Run(method, build())
    run.steps(batches[:2])
    floats = {k.split(".", 1)[1]: v.dtype for k, v in tensors_of(run.optimizer).items() if v.is_floating_point()}
    assert torch.bfloat16 not in floats.values()
    names = ("p", "seen") if method.kalman else ("momentum", "exp_avg")
    assert {floats[name] for name in names} == {torch.float32}


def test_resume_after_a_failed_capture() -> None:
    """A layer that fell back stays with the fallback, and is not checked anew."""

    class Outside(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x @ self.first.weight.T + self.first.bias)

    straight, saved = Run(METHODS["ring"], Outside(1)), None
    batches = stream(4, dtype=torch.float32)
    with pytest.warns(UserWarning, match="first-order fallback: no call was captured"):
        straight.steps(batches[:2])
    saved = straight.save()
    straight.steps(batches[2:])
    resumed = Run(METHODS["ring"], Outside(5))
    resumed.load(saved)
    resumed.steps(batches[2:])  # a second warning would be an error
    assert_same(resumed, straight)


def test_param_groups_come_back() -> None:
    """Settings of the checkpoint win over those of the constructor."""
    model = mlp(4, 4, 3)
    groups = [{"params": model[0].parameters(), "lr": 0.2, "momentum": 0.3}, {"params": model[2].parameters()}]
    with GRNG(model, "kfac", params=groups, weight_decay=0.1) as optimizer:
        train(optimizer, model, stream(1))
        saved = optimizer.state_dict()
    again = mlp(4, 4, 3)
    same_shape = [{"params": again[i].parameters()} for i in (0, 2)]
    with GRNG(again, "kfac", params=same_shape, lr=0.7) as optimizer:
        optimizer.load_state_dict(saved)
        first, second = optimizer.param_groups
        assert (first["lr"], first["momentum"], first["weight_decay"]) == (0.2, 0.3, 0.1)
        assert (second["lr"], second["momentum"]) == tuple(saved["param_groups"][1][k] for k in ("lr", "momentum"))
        assert second["lr"] != 0.7
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict({**saved, "param_groups": saved["param_groups"][:1]})


@pytest.mark.parametrize("name", ["grng_method", "grng_damping", "Lambda", "layer_status"])
def test_a_checkpoint_with_a_hole(name: str) -> None:
    """What is missing is named, and nothing changes."""
    run = Run(METHODS["ring"], mixed(torch.float32))
    run.steps(stream(1, dtype=torch.float32))
    saved, before = run.optimizer.state_dict(), tensors_of(run.optimizer)
    saved["state"] = {i: {k: v for k, v in state.items() if k != name} for i, state in saved["state"].items()}
    with pytest.raises(ValueError, match=f"checkpoint .*'{name}'"):
        run.optimizer.load_state_dict(saved)
    after = tensors_of(run.optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


ONE_EACH = ("ring", "reng-ggn", "kalman-vd", "kfac", "ekfac")
MISMATCHES = [(a, b) for a in ONE_EACH for b in ONE_EACH if a != b] + [
    ("ring", "ring-newton"),
    ("ring", "ring-diagonal"),
    ("ring-diagonal", "ring-identity"),
]


@pytest.mark.parametrize(("written", "read"), MISMATCHES)
def test_checkpoint_of_another_method(written: str, read: str) -> None:
    """It is refused in words, and nothing of the refusing optimizer changes."""
    batches = stream(2, dtype=torch.float32)
    other, own = Run(METHODS[written], mixed(torch.float32)), Run(METHODS[read], mixed(torch.float32))
    for run in (other, own):
        run.steps(batches[:1])
    before, weights = tensors_of(own.optimizer), vector(own.model)
    rates = [dict(group, params=None) for group in own.optimizer.param_groups]
    other.optimizer.param_groups[0]["lr"] = 0.77
    with pytest.raises(ValueError, match=rf"(?s)checkpoint.*{METHODS[read].variant}"):
        own.optimizer.load_state_dict(other.optimizer.state_dict())
    after = tensors_of(own.optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(vector(own.model), weights)
    assert [dict(group, params=None) for group in own.optimizer.param_groups] == rates
    own.steps(batches[1:])


@pytest.mark.parametrize("method", ["ring", "kalman-vd", "ring-identity"])
def test_checkpoint_of_another_model_or_optimizer(method: str) -> None:
    own = Run(METHODS[method], mlp(4, 5, 3))
    own.steps(stream(1))
    wider = Run(METHODS[method], mlp(4, 6, 3))
    wider.steps(stream(1))
    adam = torch.optim.AdamW(mlp(4, 5, 3).parameters())
    before = tensors_of(own.optimizer)
    for saved in (wider.optimizer.state_dict(), adam.state_dict()):
        with pytest.raises(ValueError, match=r"checkpoint.*(model|GRNG)"):
            own.optimizer.load_state_dict(saved)
        assert all(torch.equal(before[name], value) for name, value in tensors_of(own.optimizer).items())


@methods("ring", "kalman-vd", "ekfac", "ring-identity")
def test_resume_through_distributed_checkpoints(method: Method) -> None:
    """torch.distributed.checkpoint renames parameters by their names in the model; all of the state comes along."""
    pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    batches = stream(5, dtype=torch.float32)
    straight, resumed = (Run(method, mixed(torch.float32)) for _ in range(2))
    straight.steps(batches[:3])
    saved = get_optimizer_state_dict(straight.model, straight.optimizer)
    assert all(name in saved["state"] for name in dict(straight.model.named_parameters()))
    resumed.steps(batches[:1])
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.schedule.load_state_dict(straight.schedule.state_dict())
    set_optimizer_state_dict(resumed.model, resumed.optimizer, saved)
    for run in (straight, resumed):
        run.steps(batches[3:])
    assert_same(resumed, straight)


def test_state_dict_is_stable() -> None:
    """Asking twice gives the same; a saved state does not follow the optimizer's next step."""
    run = Run(METHODS["ring"], mixed())
    run.steps(stream(1))
    first, second = tensors_of(run.optimizer), tensors_of(run.optimizer)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = run.optimizer.state_dict()["state"].values()
    assert all(isinstance(value, Tensor) for state in states for value in state.values())


class Scored(nn.Module):
    """A squared error's model: the filter estimates its noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("noise", ["scalar", "diagonal", "full"])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_rolling_back(at: int, noise: str) -> None:
    """An optimizer that has gone on is taken back to a checkpoint of its own, also to one of before its first step."""
    model = Scored()
    optimizer = GRNG(model, "kalman", curvature=Curvature(noise=noise))
    batches = [(x, torch.stack([x.sum(1), x[:, 0] ** 2], 1)) for x, _ in stream(12)]

    def run(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        for x, y in parts:
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
        return vector(model)

    run(batches[:at])
    saved = deepcopy((model.state_dict(), optimizer.state_dict()))
    first = run(batches[at:])
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert torch.equal(run(batches[at:]), first)


@pytest.mark.parametrize("size", [16, 9000])
def test_a_checkpoint_of_another_kind_of_device(size: int) -> None:
    """Where the state of the generator is of another size, its labels are drawn anew, and the user is told."""
    model = mlp(4, 3)
    optimizer = GRNG(model, "ring")
    train(optimizer, model, stream(2))
    saved = deepcopy(optimizer.state_dict())
    first = next(iter(saved["state"].values()))
    first["fisher_rng"] = torch.arange(size).to(torch.uint8)
    other = mlp(4, 3)
    loaded = GRNG(other, "ring")
    with pytest.warns(GRNGWarning, match="the checkpoint is of another kind of device"):
        loaded.load_state_dict(saved)
    train(loaded, other, stream(2))
    assert loaded.state_dict()["state"][0]["grng_steps"] == 4


# A model that is moved under its optimizer, as trainers do; to another device in tests/device.


@pytest.mark.parametrize("first", ["forward", "state_dict", "load_state_dict"])
@pytest.mark.parametrize("when", [0, 3])
@methods()
def test_a_model_in_another_precision_since(method: Method, when: int, first: str) -> None:
    """Goes on as a new optimizer with the checkpoint would, to the bit, whatever asks first where the state is."""
    model = mixed(torch.float32)
    optimizer, batches = method(model), stream(7)
    train(optimizer, model, [(x.float(), y) for x, y in batches[:when]])
    saved = deepcopy((model.state_dict(), optimizer.state_dict()))
    model.double()
    if first == "state_dict":
        optimizer.state_dict()
    elif first == "load_state_dict":
        optimizer.load_state_dict(saved[1])
    train(optimizer, model, batches[when:])
    assert {row.verified for row in optimizer.coverage()} <= {"yes", "-"}
    other = mixed(torch.float64)
    with method(other) as fresh:
        other.load_state_dict(saved[0])
        fresh.load_state_dict(saved[1])
        train(fresh, other, batches[when:])
        state = tensors_of(fresh)
    assert torch.equal(vector(model), vector(other))
    for name, value in tensors_of(optimizer).items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True, msg=name)
        assert value.dtype == torch.float64 or name.split(".")[-1] not in ("momentum", "exp_avg", "exp_avg_sq")
    optimizer.close()


@methods("kalman-vd", "kalman-kron")
def test_posterior_of_a_model_in_another_precision_since(method: Method) -> None:
    model = mixed(torch.float32)
    with method(model) as optimizer:
        train(optimizer, model, [(x.float(), y) for x, y in stream(3)])
        before = optimizer.posterior.variance()
        model.double()
        after = optimizer.posterior.variance()
    for name, value in before.items():
        assert after[name].dtype == torch.float64
        torch.testing.assert_close(after[name], value.double(), rtol=1e-6, atol=0)
