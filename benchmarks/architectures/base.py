"""What a row of the grid is: a tiny model, its input, its loss, and what is claimed of every parameter."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from grng.curvature.passes import find_output

Batch = tuple[Any, Tensor]
KINDS = ("exact", "approximation", "uncovered", "fallback", "unused")


class Claim(NamedTuple):
    """What is said of a parameter, and in which words.

    `exact`: the captured pair gives autograd's gradient, and the factors are those of brute force. `approximation`:
    the pair does, the factors are the approximation that the words name. `uncovered`: no factors for it, known when
    the optimizer is built: the fallback under ring, a diagonal under kalman. `fallback`: under both, most often because
    the self-check finds that the weights are used where no capture sees it, and warns. `unused`: it gets no gradient.
    """

    kind: str
    words: str = ""


EXACT = Claim("exact")
UNUSED = Claim("unused")
OUTSIDE = Claim("fallback", "its weights are used outside its forward()")
MISSES = Claim("fallback", "the captured pair misses the gradient")
NO_SAMPLES = Claim("approximation", "called once for all samples: its rows are sums over them")


def uncovered(words: str) -> Claim:
    return Claim("uncovered", words)


def classify(output: Any, y: Tensor) -> Tensor:
    """Cross-entropy over the last dimension, averaged over all others."""
    f = find_output(output)
    assert f is not None
    return cross_entropy(f.flatten(0, -2), y.flatten())


def regress(output: Any, y: Tensor) -> Tensor:
    f = find_output(output)
    assert f is not None
    return mse_loss(f, y)


@dataclass(frozen=True)
class Architecture:
    """One row.

    Args:
        name: as in the table.
        build: the model; in float64 unless `dtype` says otherwise.
        inputs: of a batch of B samples: a tensor, or a dict of keyword arguments.
        claims: by patterns of parameter names, the first that fits; exact for parameters that none fits.
        backpack: what differs where capture="backpack" is asked for: claims; or the error, as a pattern.
        loss: of the output and the targets.
        scope: in which the forward pass runs.
        between: what is done to the model and the optimizer between two steps.
        coupled: samples see each other (batch statistics), so that none has a gradient of its own.
        needs: the package that it comes from.
        dtype: of parameters and inputs.
        brute: whether it is small enough for factors by brute force.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    claims: Mapping[str, Claim] = field(default_factory=dict)
    backpack: Mapping[str, Claim] | str = field(default_factory=dict)
    loss: Callable[[Any, Tensor], Tensor] = classify
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    between: Callable[[nn.Module, Any], Any] = lambda model, optimizer: None
    coupled: bool = False
    needs: str = ""
    dtype: torch.dtype = torch.float64
    brute: bool = True

    def make(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().to(self.dtype)

    def batch(self, model: nn.Module, B: int, seed: int = 1) -> Batch:
        """Inputs, and targets that fit the model's output."""
        torch.manual_seed(seed)
        x = self.inputs(B)
        x = {k: self._cast(v) for k, v in x.items()} if isinstance(x, dict) else self._cast(x)
        with torch.no_grad():
            f = _tensor_of(self.forward(model, x))
        y = torch.randn_like(f) if self.loss is regress else torch.randint(f.shape[-1], f.shape[:-1])
        return x, y

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x

    def forward(self, model: nn.Module, x: Any) -> Any:
        with self.scope():
            return model(**x) if isinstance(x, dict) else model(x)

    def value(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        return self.loss(self.forward(model, x), y)

    @property
    def tolerance(self) -> float:
        """Of exactness, relative."""
        return 1e-9 if self.dtype == torch.float64 else 1e-3

    def refusal(self, engine: str) -> str:
        """The error that is claimed, as a pattern."""
        return self.backpack if engine == "backpack" and isinstance(self.backpack, str) else ""

    def claim(self, parameter: str, engine: str = "hooks") -> Claim:
        own = self.backpack if engine == "backpack" and not isinstance(self.backpack, str) else {}
        for pattern, claim in (*own.items(), *self.claims.items()):
            if fnmatchcase(parameter, pattern):
                return claim
        return EXACT


def _tensor_of(output: Any) -> Tensor:
    """As `find_output`, of a pass without a graph."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return next(iter(output.values() if isinstance(output, dict) else output))
