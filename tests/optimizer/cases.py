"""Models, batches and the table of methods that the optimizer's tests run on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from grng import GRNG, Curvature
from grng.preconditioners import KFAC, Kalman, Preconditioner

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """One way to call GRNG: a variant, and where a row asks for it another preconditioner or mode."""

    name: str
    variant: str
    preconditioner: Callable[[], Preconditioner | str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module, **settings: Any) -> GRNG:
        which = {} if self.preconditioner is None else {"preconditioner": self.preconditioner()}
        return GRNG(model, self.variant, **{**which, **self.settings, **settings})

    @property
    def kalman(self) -> bool:
        return self.name.startswith("kalman")


METHODS = {
    method.name: method
    for method in (
        Method("ring", "ring"),
        Method("ring-factored", "ring", lambda: KFAC(solver="factored")),
        Method("ring-newton", "ring", lambda: KFAC(solver="newton")),
        Method("reng-double", "reng", settings={"mode": "double"}),
        Method("reng-finite", "reng", settings={"mode": "finite"}),
        Method("reng-ggn", "reng", settings={"mode": "ggn"}),
        Method("kalman-vd", "kalman"),
        Method("kalman-fd", "kalman", lambda: Kalman(projection="fd")),
        Method("kalman-sample", "kalman", lambda: Kalman(columns="sample", penalty="fading", process_noise=1e-6)),
        Method("kalman-kron", "kalman", lambda: Kalman(covariance="kron")),
        Method("kalman-kron-exact", "kalman", lambda: Kalman(covariance="kron", gain="exact")),
        Method("kfac", "kfac"),
        Method("ekfac", "ekfac"),
        Method("ring-diagonal", "ring", lambda: "diagonal"),
        Method("ring-identity", "ring", lambda: "identity"),
    )
}
ONE_PASS = [name for name in METHODS if name not in ("reng-double", "reng-finite")]
SUMMED = [name for name, method in METHODS.items() if method.kalman]
# An average over the batch: what it is made of does not grow with the batch.
AVERAGED = [name for name, method in METHODS.items() if not method.kalman]


def methods(*names: str) -> pytest.MarkDecorator:
    """Run a test on the methods of those names; on all of them without names."""
    return pytest.mark.parametrize("method", [METHODS[n] for n in names or METHODS], ids=names or list(METHODS))


def mlp(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        modules += [nn.Linear(n_in, n_out, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


class Affine(nn.Module):
    """A scale and shift of one's own, which have no factors."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def mixed(dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Sequential:
    """Two layers of one shape, one of another without bias, and an `Affine` that the fallback trains."""
    torch.manual_seed(seed)
    layers = (nn.Linear(4, 4), Affine(4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    return nn.Sequential(*layers).to(dtype)


def cnn(dtype: torch.dtype = torch.float32, classes: int = 3, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    ).to(dtype)


class Transformer(nn.Module):
    """One pre-norm block: two embeddings, attention made of Linear layers, an MLP; (B, T) tokens to (B, C) logits."""

    def __init__(self, tokens: int = 7, length: int = 6, width: int = 8, classes: int = 7) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x).mean(1))


class Root(Preconditioner):
    """D = -g / (sqrt(mean squared per-sample gradient) + lam)."""

    def allocate(self) -> None:
        self.second = self.moment("second", lambda group: (group.n_out, group.n_in))

    def observe(self, layer: Any, statistics: Any) -> None:
        self.second.add(layer, statistics.squared_gradients())

    def refresh(self, batch: Any, decompose: bool) -> None:
        self.second.update(batch)

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return [-g / (s.sqrt() + d) for g, s, d in zip(gradients, self.second.values, damping, strict=True)]


def stream(steps: int, B: int = 8, n_in: int = 4, C: int = 3, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Classification batches, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(B, n_in, generator=generator).to(dtype), torch.randint(C, (B,), generator=generator))
        for _ in range(steps)
    ]


def closure_of(
    optimizer: torch.optim.Optimizer, model: nn.Module, parts: Sequence[Batch], loss: Loss = cross_entropy
) -> Callable[[], Tensor]:
    """Gradients accumulated over the parts of a batch, each with its share of the mean loss."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in parts:
            value = loss(model(x), y) / len(parts)
            value.backward()
            total = total + value.detach()
        return total

    return closure


def train(
    optimizer: torch.optim.Optimizer, model: nn.Module, batches: Iterable[Batch], loss: Loss = cross_entropy
) -> list[float]:
    """One step a batch, by closure where the method needs one; the losses before the steps."""
    losses = []
    for batch in batches:
        closure = closure_of(optimizer, model, [batch], loss)
        if getattr(optimizer, "requires_closure", False):
            losses.append(torch.as_tensor(optimizer.step(closure)).item())
        else:
            losses.append(closure().item())
            optimizer.step()
    return losses


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector([p.detach() for p in model.parameters()]).clone()


def displacement(model: nn.Module, update: Callable[[], Any]) -> Tensor:
    """How far `update()` moves the parameters."""
    before = vector(model)
    update()
    return vector(model) - before


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of every tensor of the state, by parameter number and name, of a list also by its place."""
    found = {}
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            parts = {f"{name}.{k}": part for k, part in enumerate(value)} if isinstance(value, list) else {name: value}
            found.update({f"{i}.{part}": tensor.detach().clone() for part, tensor in parts.items()})
    return found


def live_hooks(model: nn.Module) -> int:
    """Hooks of any kind on the modules and parameters of a model."""
    count = 0
    for module in model.modules():
        count += len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._state_dict_pre_hooks)
        count += len(module._backward_hooks) + len(module._backward_pre_hooks)
    for p in model.parameters():
        count += len(p._backward_hooks or {}) + len(getattr(p, "_post_accumulate_grad_hooks", None) or {})
    return count


def settings(**values: Any) -> Curvature:
    """Curvature settings of a hand-checked step: no trust region, everything measured at every step."""
    return Curvature(**{"kl_clip": None, "stats_every": 1, **values})


class Positions(nn.Module):
    """An embedding that does not see the samples: its gradient does not tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.head = nn.Embedding(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.place(torch.arange(3)))).mean(1)
