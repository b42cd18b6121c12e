"""Several processes under DistributedDataParallel take one step, to the bit, and it is that of one process."""

import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from grng.baselines import SophiaG, SophiaH
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, one_hot
from torch.nn.parallel import DistributedDataParallel

from grng import GRNG, Curvature
from grng.regularizers import GNP, Explicit, Regularized

from ..processes import PATIENCE, together
from ..test_docs import PAGES, examples
from .cases import METHODS, Root, Transformer, mixed, mlp, stream, tensors_of, vector

STEPS = 4
STOP = 2  # after which a checkpoint is taken
WORLD = 4
SIZES = (2, 4)


def plain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y


class Experts(nn.Module):
    """Each sample goes through one of two layers, so that a part of a batch may leave one of them unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.tanh(self.first(x)), torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            if chosen.any():
                out[chosen] = expert(h[chosen])
        return self.head(torch.tanh(out))


class Bypassed(nn.Module):
    """The last process uses the weights of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
        self.around = dist.is_initialized() and dist.get_rank() == WORLD - 1

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, self.first.weight, self.first.bias) if self.around else self.first(x)
        return self.last(torch.tanh(h))


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).double()


def transformer() -> nn.Module:
    torch.manual_seed(1)
    return Transformer().double()


def linear() -> nn.Module:
    """Without parameters outside of layers, for which labels are drawn also where the Fisher is exact."""
    return mlp(4, 5, 3)


def embedded() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(4, 3)).double()


def tokens(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x[:, [0, 1, 2, 3, 0, 1]] * 100).long() % 7, y


def pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Fewer inputs than samples: of a singular factor no eigenbasis is the only one."""
    return tokens(x, y)[0][:, :2], y


def ordered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    order = x[:, 0].argsort()
    return x[order], y[order]


def classes(f: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(f, y, reduction="sum")


def values(f: Tensor, y: Tensor) -> Tensor:
    return mse_loss(f, one_hot(y, 3).to(f), reduction="sum") / 3


def switches(f: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(f, one_hot(y, 3).to(f), reduction="sum") / 3


class RMS(Root):
    """A user's own, which knows nothing of processes."""

    name = "rms"


class Alone(RMS):
    """One that keeps what it observes to itself."""

    name = "alone"

    def observe(self, layer: Any, statistics: Any) -> None:
        self.second.of(layer).copy_(statistics.squared_gradients())

    def refresh(self, batch: Any, decompose: bool) -> None:
        for count in self.second.counts:
            count.fill_(1)


def grng(method: str, fisher: str = "mc", **settings: Any) -> Callable[[nn.Module], GRNG]:
    def make(model: nn.Module) -> GRNG:
        curvature = {"fisher": fisher, "stats_every": 2, "inverse_every": 2, "burn_in": 2, "kl_clip": 1e-2}
        names = {name: settings[name] for name in settings.keys() & curvature.keys() | settings.keys() & {"noise"}}
        others = {name: value for name, value in settings.items() if name not in names}
        return METHODS[method](model, curvature=Curvature(**{**curvature, **names}), **others)

    return make


def followed(model: nn.Module) -> GRNG:
    """Damped by the reduction of the loss, which every second step looks at."""
    optimizer = GRNG(model, "kfac", lr=1.0, curvature=Curvature("exact", damping="levenberg-marquardt", stats_every=2))
    optimizer._damping.every = 2
    return optimizer


def sgd(rule: Any) -> Callable[[nn.Module], Regularized]:
    return lambda model: Regularized(torch.optim.SGD(model.parameters(), lr=0.1), rule, model=model)


@dataclass(frozen=True)
class Row:
    """How a model is trained, and how a batch of 8 is parted between the processes."""

    make: Callable[[nn.Module], Any]
    model: Callable[[], nn.Module] = mixed
    data: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = plain
    loss: Callable[[Tensor, Tensor], Tensor] = classes
    parts: Callable[[int], list[int]] = lambda size: [8 // size] * size
    micro: int = 1
    spoilt: tuple[int, ...] = ()
    given: str = "inner"  # or "ddp": which of the two the optimizer is built over
    wrap: dict[str, Any] = field(default_factory=dict)
    equal: bool = True  # to one process, and not only the processes to each other
    odd: Callable[[Tensor, Tensor], Tensor] | None = None  # what the last process has for a loss in the first step
    sizes: tuple[int, ...] = (2,)


def uneven(size: int) -> list[int]:
    return [5, 3] if size == 2 else [3, 1, 2, 2] if size == 4 else [8]


def smoothed(f: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(f, y, reduction="sum", label_smoothing=0.2)


def nothing(f: Tensor, y: Tensor) -> Tensor:
    return 0 * f.sum()


AT_FOUR = ("ring", "ring-newton", "reng-double", "reng-finite", "kalman-vd", "kalman-kron", "ekfac", "ring-diagonal")
EXACT = {f"{name}-{f}": Row(grng(name, f)) for name in ("ring", "ekfac", "kalman-vd") for f in ("exact", "empirical")}
ROWS = {
    **{name: Row(grng(name), sizes=SIZES if name in AT_FOUR else (2,)) for name in METHODS},
    **EXACT,
    **{f"{name}-tokens": Row(grng(name), embedded, pairs) for name in ("ring", "ekfac", "kalman-vd")},
    # Places are looked up once a process, not once a sample: their squares are those of other sums.
    **{f"{name}-places": Row(grng(name), transformer, tokens, equal=False) for name in ("ring", "kalman-vd")},
    **{f"{name}-conv": Row(grng(name), convolutions) for name in ("ring", "kalman-vd")},
    "ring-uneven": Row(grng("ring", "exact"), parts=uneven, sizes=SIZES),
    "ekfac-uneven": Row(grng("ekfac", "empirical"), parts=uneven, sizes=SIZES),
    "kalman-vd-uneven": Row(grng("kalman-vd", "exact"), linear, parts=uneven, sizes=SIZES),
    "kalman-kron-uneven": Row(grng("kalman-kron", "empirical"), parts=uneven),
    "ring-uneven-drawn": Row(grng("ring"), parts=uneven, equal=False, sizes=SIZES),
    "ring-experts": Row(grng("ring"), Experts, ordered, wrap={"find_unused_parameters": True}, sizes=SIZES),
    "ekfac-experts": Row(grng("ekfac"), Experts, ordered, wrap={"find_unused_parameters": True}),
    "reng-double-experts": Row(grng("reng-double"), Experts, ordered, wrap={"find_unused_parameters": True}),
    "kalman-experts": Row(
        grng("kalman-vd"), Experts, ordered, wrap={"find_unused_parameters": True}, equal=False, sizes=SIZES
    ),
    **{f"{name}-spoilt": Row(grng(name, "exact"), linear, spoilt=(0, 2)) for name in ("ring", "ekfac", "kalman-vd")},
    "ring-spoilt-later": Row(grng("ring"), spoilt=(2,), sizes=SIZES),
    **{f"{name}-micro": Row(grng(name, "exact"), linear, micro=2) for name in ("ring", "ekfac", "kalman-vd")},
    "ring-micro-drawn": Row(grng("ring"), micro=2, equal=False),
    "ring-ddp": Row(grng("ring"), given="ddp", wrap={"gradient_as_bucket_view": True}),
    "reng-double-ddp": Row(grng("reng-double"), given="ddp"),
    "kalman-ddp-static": Row(grng("kalman-vd"), given="ddp", wrap={"static_graph": True}),
    "kalman-values": Row(grng("kalman-vd"), loss=values, sizes=SIZES),
    "kalman-values-diagonal": Row(grng("kalman-vd", noise="diagonal"), loss=values),
    "kalman-values-full": Row(grng("kalman-fd", noise="full"), loss=values),
    "ring-values": Row(grng("ring"), loss=values),
    "ring-switches": Row(grng("ring"), loss=switches),
    "ring-layers": Row(grng("ring", norm="layer")),
    "ring-chosen-period": Row(grng("ring", inverse_every=None)),
    "kfac-followed": Row(followed, sizes=SIZES),
    "ring-rms": Row(grng("ring", preconditioner=RMS()), sizes=SIZES),
    "ring-gnp": Row(grng("ring", regularizer=GNP(0.1))),
    "ring-smoothed-there": Row(grng("ring"), odd=smoothed, equal=False, sizes=SIZES),
    "ring-nothing-there": Row(grng("ring"), odd=nothing, equal=False),
    "ring-bypassed-there": Row(grng("ring"), Bypassed, equal=False, sizes=SIZES),
    "explicit-double": Row(sgd(Explicit(0.1, mode="double"))),
    "explicit-ggn": Row(sgd(Explicit(0.1, mode="ggn")), given="ddp"),
    "sophia-g": Row(lambda model: SophiaG(model, lr=0.01, interval=2)),
    "sophia-h": Row(lambda model: SophiaH(model.parameters(), lr=0.01, interval=2)),
}
TRAVELLING = ("ring", "kfac-followed", "reng-double", "kalman-vd", "ekfac", "ring-gnp", "kalman-values")
BY_NAME = ("reng-double", "kalman-values")  # those of them that go by torch.distributed.checkpoint too


class Run:
    """A row in one process of several, or in the only one."""

    def __init__(self, row: Row, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.row, self.rank, self.size, self.group = row, rank, size, group
        self.model = row.model()
        self.called = self.model
        if group is not None:
            self.called = DistributedDataParallel(self.model, process_group=group, **row.wrap)
        self.optimizer = row.make(self.called if row.given == "ddp" else self.model)

    def steps(self, first: int = 0, last: int = STEPS) -> Tensor:
        """The weights after each step."""
        return torch.stack([self.step(t, *batch) for t, batch in enumerate(stream(last)) if t >= first])

    def step(self, t: int, x: Tensor, y: Tensor) -> Tensor:
        row = self.row
        x, y = row.data(x, y)
        if t in row.spoilt:
            x[-1] = torch.nan
        sizes = row.parts(self.size)
        x, y = (z.split(sizes)[self.rank] for z in (x, y))
        loss = row.odd if row.odd and t == 0 and self.rank == self.size - 1 and self.size > 1 else row.loss
        parts = list(zip(x.chunk(row.micro), y.chunk(row.micro), strict=True))

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            for i, (x, y) in enumerate(parts):
                last = i == len(parts) - 1 or self.group is None
                with nullcontext() if last else self.called.no_sync():
                    value = self.size / sum(sizes) * loss(self.called(x), y)
                    value.backward()
            return value

        if getattr(self.optimizer, "requires_closure", False):
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()
        return vector(self.model)

    def checkpoint(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, saved: dict[str, Any]) -> "Run":
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return self

    def save_distributed(self, path: Path) -> None:
        state = get_optimizer_state_dict(self.called, self.optimizer)
        where = {"no_dist": True} if self.group is None else {"process_group": self.group}
        dcp.save({"model": self.model.state_dict(), "optimizer": state}, checkpoint_id=path, **where)

    def load_distributed(self, path: Path) -> "Run":
        state = get_optimizer_state_dict(self.called, self.optimizer)
        saved = {"model": self.model.state_dict(), "optimizer": state}
        dcp.load(
            saved, checkpoint_id=path, **({"no_dist": True} if self.group is None else {"process_group": self.group})
        )
        self.model.load_state_dict(saved["model"])
        set_optimizer_state_dict(self.called, self.optimizer, saved["optimizer"])
        return self

    def close(self) -> None:
        getattr(self.optimizer, "close", lambda: None)()


# In the processes.


def worker(rank: int, where: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    pairs = [dist.new_group(ranks, timeout=PATIENCE) for ranks in ([0, 1], [2, 3])]
    four, two = (rank, 4, dist.group.WORLD), (rank % 2, 2, pairs[rank // 2])
    found: dict[str, Any] = {}
    for name, row in ROWS.items():
        if 4 in row.sizes:
            found[f"{name} 4"] = followed(row, *four)
    for i, (name, row) in enumerate(ROWS.items()):  # two rows at a time
        if i % 2 == rank // 2:
            found[f"{name} 2"] = followed(row, *two)
    for i, name in enumerate(TRAVELLING):
        travel(name, where, four, found)
        if i % 2 == rank // 2:
            travel(name, where, two, found)
    dist.barrier()
    for i, name in enumerate(TRAVELLING):
        found[f"{name} 2 -> 4"] = arrive(name, where / f"{name} 2", four)
        if i % 2 == rank // 2:
            found[f"{name} 4 -> 2"] = arrive(name, where / f"{name} 4", two)
    return found | messages(rank, four)


def followed(row: Row, *place: Any) -> dict[str, Any]:
    run = Run(row, *place)
    steps = run.steps()
    run.close()
    return {"steps": steps, "state": tensors_of(run.optimizer)}


def travel(name: str, folder: Path, place: tuple[Any, ...], found: dict[str, Any]) -> None:
    """Go on from one process's checkpoint, and leave one of several."""
    rank, size, _ = place
    found[f"{name} 1 -> {size}"] = arrive(name, folder / f"{name} 1", place)
    run = Run(ROWS[name], *place)
    run.steps(0, STOP)
    if name in BY_NAME:
        run.save_distributed(folder / f"{name} {size}")
    if rank == 0:
        torch.save(run.checkpoint(), folder / f"{name} {size}.pt")
    run.close()


def arrive(name: str, path: Path, place: tuple[Any, ...]) -> list[Tensor]:
    """Where it ends that goes on from either kind of checkpoint."""
    ends = []
    for by_name in (False, True)[: 1 + (name in BY_NAME)]:
        run = Run(ROWS[name], *place)
        if by_name:
            run.load_distributed(path)
        else:
            run.load(torch.load(f"{path}.pt", weights_only=True))
        ends.append(run.steps(STOP)[-1])
        run.close()
    return ends


def messages(rank: int, four: tuple[Any, ...]) -> dict[str, Any]:
    """What is refused, what is warned of, and how much is sent."""
    found: dict[str, Any] = {}

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except (RuntimeError, ValueError) as error:
                found[name] = f"{type(error).__name__}: {error}"
                return
        found[name] = "; ".join(str(each.message) for each in caught)

    with noted("own observations"):
        Run(Row(grng("ring", preconditioner=Alone())), *four).steps()
    run = Run(ROWS["ring"], *four)
    with noted("no_sync"), run.called.no_sync():
        run.steps()
    run.close()
    run = Run(ROWS["ring"], *four)
    with noted("join"), run.called.join():
        run.step(0, *stream(1)[0])
    run.close()
    with noted("no DDP"):
        Run(ROWS["ring"]).steps(0, 1)
    model = mlp(4, 5, 3)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (WORLD,)))
    with noted("fully_shard"):
        GRNG(model)
    for name in ("ring-smoothed-there", "ring-bypassed-there"):
        run = Run(ROWS[name], *four)
        with noted(name):
            run.step(0, *stream(1)[0])
        found[f"{name} coverage"] = str(run.optimizer.coverage())
        run.close()
    for name in ("ring", "kfac", "ekfac", "ring-diagonal"):
        with counted() as calls:
            run = Run(ROWS[name], *four)
            sent = [(run.step(t, *batch), len(calls))[1] for t, batch in enumerate(stream(STEPS))]
            run.close()
        found[f"{name} sent"] = sent
    with counted() as calls:
        single = dist.new_subgroups(1)[0]
        found["single"] = followed(ROWS["ring"], 0, 1, single)["steps"]
    found["single sent"] = len(calls)
    return found


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collective calls from Python; those of DistributedDataParallel's own gradients are none."""
    calls: list[str] = []
    names = ("all_reduce", "all_gather", "all_gather_object")
    kept = {name: getattr(dist, name) for name in names}
    for name in names:
        setattr(dist, name, lambda *a, name=name, **k: (calls.append(name), kept[name](*a, **k))[1])
    try:
        yield calls
    finally:
        for name in names:
            setattr(dist, name, kept[name])


# What they found.


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process ended with, and one process beside them."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in TRAVELLING:
        run = Run(ROWS[name])
        run.steps(0, STOP)
        if name in BY_NAME:
            run.save_distributed(folder / f"{name} 1")
        torch.save(run.checkpoint(), folder / f"{name} 1.pt")
    found = together(worker, WORLD, folder, __name__)
    for name in TRAVELLING:
        for size in SIZES:
            found[0][f"{name} {size} -> 1"] = arrive(name, folder / f"{name} {size}", (0, 1, None))
    return found


def of(ends: list[dict[str, Any]], key: str) -> list[Any]:
    """What the processes that were in it say of something."""
    return [found[key] for found in ends if key in found]


@pytest.fixture(scope="module")
def alone() -> Callable[[str], dict[str, Any]]:
    """What one process finds, on the whole batch."""
    known: dict[str, dict[str, Any]] = {}

    def find(name: str) -> dict[str, Any]:
        if name not in known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                known[name] = followed(ROWS[name], 0, 1)
        return known[name]

    return find


EVERY = [(name, size) for name, row in ROWS.items() for size in row.sizes]
EQUAL = [(name, size) for name, size in EVERY if ROWS[name].equal]


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_processes_agree_to_the_bit(ends: list[dict[str, Any]], name: str, size: int) -> None:
    """Weights after every step and all of the state, the source of the drawn labels included."""
    first, *others = of(ends, f"{name} {size}")
    assert len(others) == size - 1
    assert first["steps"].isfinite().all()
    assert (first["steps"][-1] - first["steps"][0]).norm() > 1e-3
    for other in others:
        assert torch.equal(other["steps"], first["steps"])
        assert other["state"].keys() == first["state"].keys()
        assert [n for n, value in other["state"].items() if not torch.equal(value, first["state"][n])] == []


@pytest.mark.parametrize(("name", "size"), EQUAL)
def test_step_is_that_of_one_process(
    ends: list[dict[str, Any]], alone: Callable[[str], dict[str, Any]], name: str, size: int
) -> None:
    found, expected = of(ends, f"{name} {size}")[0], alone(name)
    torch.testing.assert_close(found["steps"], expected["steps"], rtol=0, atol=1e-10)
    assert found["state"].keys() == expected["state"].keys()
    for n, value in expected["state"].items():
        # An expert that neither the first nor the last sample goes to shows no order, but may do so in its process.
        part = slice(2) if n.endswith("layer_status") else ...
        torch.testing.assert_close(found["state"][n][part], value[part], rtol=1e-7, atol=1e-9, msg=n)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ring-identity"])
def test_a_part_of_the_batch_shows(alone: Callable[[str], dict[str, Any]], name: str) -> None:
    """One process with the first half of the batch goes elsewhere: the equality above is not that of everything."""
    half = Run(ROWS[name], 0, 2)
    assert not torch.allclose(half.steps(), alone(name)["steps"], atol=1e-4)
    half.close()


def test_drawn_labels_of_two_processes_differ(alone: Callable[[str], dict[str, Any]]) -> None:
    """Otherwise the second half of a batch whose halves are equal would say nothing new."""
    row = ROWS["ring"]
    twice = Row(row.make, data=lambda x, y: (torch.cat([x[:4]] * 2), torch.cat([y[:4]] * 2)))
    one, both = Run(row, 0, 2), Run(twice)
    assert not torch.allclose(one.steps(), both.steps(), atol=1e-6)
    for run in (one, both):
        run.close()


@pytest.mark.parametrize("name", TRAVELLING)
@pytest.mark.parametrize("way", [(a, b) for a in (1, *SIZES) for b in (1, *SIZES) if a != b], ids=str)
def test_state_travels(
    ends: list[dict[str, Any]], alone: Callable[[str], dict[str, Any]], name: str, way: tuple[int, int]
) -> None:
    """A checkpoint of some processes goes on in more or fewer as if nothing had been, through either kind of file."""
    found = of(ends, f"{name} {way[0]} -> {way[1]}")
    assert len(found) == way[1]
    for end in (end for both in found for end in both):
        torch.testing.assert_close(end, alone(name)["steps"][-1], rtol=0, atol=1e-10)


GNP_OVER = {
    "sgd": lambda model: Regularized(torch.optim.SGD(model.parameters(), lr=0.1), GNP(0.1, warmup="r", warmup_steps=4)),
    "adamw": lambda model: Regularized(torch.optim.AdamW(model.parameters()), GNP(0.1, warmup="r", warmup_steps=4)),
    "ring": lambda model: Regularized(GRNG(model), GNP(0.1, warmup="r", warmup_steps=4)),
}
NAMED = {
    **{name: ROWS[name] for name in (*METHODS, "ring-gnp", "kalman-values", "sophia-g", "sophia-h")},
    **{f"gnp over {name}": Row(make) for name, make in GNP_OVER.items()},
    **{f"{name}-momentum": Row(grng(name, momentum=0.5)) for name in ("kfac", "kalman-vd")},
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_resume_by_names(tmp_path: Path, name: str) -> None:
    """torch.distributed.checkpoint reads by the names of a fresh optimizer's state: nothing is lost on the way."""
    straight, resumed = Run(NAMED[name]), Run(NAMED[name])
    straight.steps(0, STOP)
    straight.save_distributed(tmp_path)
    nn.utils.vector_to_parameters(0 * vector(resumed.model), resumed.model.parameters())
    resumed.load_distributed(tmp_path)
    ends = [run.steps(STOP) for run in (straight, resumed)]
    assert torch.equal(*ends)
    mine, theirs = tensors_of(resumed.optimizer), tensors_of(straight.optimizer)
    assert mine.keys() == theirs.keys()
    assert [n for n in mine if mine[n].dtype != theirs[n].dtype or not torch.equal(mine[n], theirs[n])] == []
    for run in (straight, resumed):
        run.close()


# AdamW counts the step by which its state is made.
@pytest.mark.parametrize("name", [name for name in NAMED if name != "gnp over adamw"])
def test_asking_for_the_state_disturbs_nothing(name: str) -> None:
    """It is asked for before the first step, which torch makes on gradients of zero where there is no state."""
    plain, asked = Run(NAMED[name]), Run(NAMED[name])
    assert get_optimizer_state_dict(asked.model, asked.optimizer)["state"]
    assert torch.equal(plain.steps(), asked.steps())
    for run in (plain, asked):
        run.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_that_names_left_incomplete(tmp_path: Path) -> None:
    """What no optimizer can have before its first step is missed in words, and found after it."""
    row = ROWS["kalman-values-diagonal"]
    straight, fresh = Run(row), Run(row)
    straight.steps(0, STOP)
    straight.save_distributed(tmp_path)
    with pytest.raises(ValueError, match=r"not whole.*make a step"):
        fresh.load_distributed(tmp_path)
    fresh.steps(0, 1)
    fresh.load_distributed(tmp_path)
    assert torch.equal(fresh.steps(STOP), straight.steps(STOP))
    for run in (straight, fresh):
        run.close()


REFUSED = {
    "own observations": r"RuntimeError: .*one gradient.*'alone'.*self\.moment",
    "no_sync": r"RuntimeError: .*different gradients.*no_sync",
    "join": r"RuntimeError: .*join.*DistributedSampler",
    "no DDP": r"no DistributedDataParallel calls the model",
    "fully_shard": r"ValueError: .*DTensor.*DistributedDataParallel",
    "ring-smoothed-there": r"empirical Fisher: (another process|the output gradient)",
    "ring-bypassed-there": r"first by the first-order fallback: (no call|its capture failed in another)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_said_by_every_process(ends: list[dict[str, Any]], name: str) -> None:
    said = of(ends, name)
    assert len(said) == WORLD
    for message in said:
        assert re.search(REFUSED[name], message), message


@pytest.mark.parametrize("name", ["ring-smoothed-there", "ring-bypassed-there"])
def test_coverage_is_everybodys(ends: list[dict[str, Any]], name: str) -> None:
    """But for the reasons, which say where it was seen."""
    found = [[line.split()[:5] for line in each.splitlines()] for each in of(ends, f"{name} coverage")]
    assert all(each[:-1] == found[0][:-1] for each in found)


@pytest.mark.parametrize("name", ["ring", "kfac", "ekfac", "ring-diagonal"])
def test_one_message_a_step_with_statistics(ends: list[dict[str, Any]], name: str) -> None:
    """In float64 everything is of one dtype. The first step also agrees on the likelihood, and sends the rows that wait
    for EKFAC's first basis: a list, and what it lists."""
    before = 1 + 2 * (name == "ekfac")
    assert all(sent == [before + n for n in (1, 2, 3, 3)] for sent in of(ends, f"{name} sent"))


def test_one_process_sends_nothing(ends: list[dict[str, Any]], alone: Callable[[str], dict[str, Any]]) -> None:
    """A DistributedDataParallel of one process is no other than its model, to the bit."""
    assert of(ends, "single sent") == [0] * WORLD
    assert all(torch.equal(steps, alone("ring")["steps"]) for steps in of(ends, "single"))


def test_example_under_torchrun(tmp_path: Path) -> None:
    """The page's example as it stands, in two processes, which end alike and where one process ends."""
    code = examples(next(page for page in PAGES if page.stem == "distributed"))[0]
    script, single = tmp_path / "train.py", dict[str, Any](__name__="example")
    # Without the interpreter's end: DistributedDataParallel, under any optimizer, keeps gloo's threads alive beyond
    # destroy_process_group(), and one that lets go of its last message then aborts the process.
    end = f"torch.save(model.state_dict(), f'{tmp_path}/{{rank}}.pt')\nos._exit(0)"
    script.write_text(f"{code}\n{end}\n")
    # By the loopback's address, as not every machine knows its own name.
    here = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    run = [sys.executable, "-m", "torch.distributed.run", *here, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    said = tmp_path / "said"  # a file, as those that it starts would keep a pipe open
    with said.open("w") as out:
        process = subprocess.Popen(run, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:
            assert process.wait(PATIENCE.total_seconds()) == 0, said.read_text()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    exec(compile(code, "example", "exec"), single)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in single["model"].state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)
