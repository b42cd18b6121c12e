"""What a Bayesian optimizer knows: a Gaussian over the parameters, to look at, to draw from and to predict with."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from grng.curvature import Layer
from grng.curvature.order import ROWS
from grng.curvature.passes import find_output
from grng.errors import finite, invalid
from grng.kernels import Columns, full_precision

if TYPE_CHECKING:
    from grng.optimizer import GRNG
    from grng.preconditioners import Kalman

ByName = dict[str, Tensor]


@dataclass
class Prediction:
    """A predictive distribution.

    Attributes:
        mean: class probabilities, or the mean of the target.
        variance: of the probabilities under the posterior, or of the target: model and noise together.
        model_variance: the part of the parameters alone.
    """

    mean: Tensor
    variance: Tensor
    model_variance: Tensor
    likelihood: str = "gaussian"
    class_dim: int = -1

    def log_likelihood(self, y: Tensor) -> Tensor:
        """log p(y) of every target, as a Gaussian of this mean and variance, or by the probabilities; natural log.

        Args:
            y: the targets, as the loss takes them: values, class numbers, or zeros and ones.

        Raises:
            ValueError: there are more or fewer than predictions.
        """
        shape = list(self.mean.shape)
        if self.likelihood == "categorical":
            del shape[self.class_dim]
        if list(y.shape) != shape:
            raise invalid("y", tuple(y.shape), f"of shape {tuple(shape)}", "One target a prediction.")
        if self.likelihood == "gaussian":
            return -0.5 * ((y - self.mean).square() / self.variance + (2 * torch.pi * self.variance).log())
        if self.likelihood == "categorical":
            log_p = self.mean.log().movedim(self.class_dim, -1)
            return log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return torch.where(y > 0.5, self.mean, 1 - self.mean).log()


class Posterior:
    r"""N(mean, P / T'), P the filter's covariance after the last step, T' = data_size / (n_eff temperature).

    The filter forgets: its P holds the information of its last n_eff samples, n_eff = B/gamma in the long run, not that
    of the whole data set. `data_size` says how many the posterior shall speak for; None leaves it at n_eff.
    `temperature` multiplies the covariance. Parameters that the filter does not cover are known for certain here.

    Obtained as `optimizer.posterior`; every call looks at the optimizer as it is then. Derived here.

    Example:
        >>> from grng import GRNG
        >>> _ = torch.manual_seed(0)
        >>> x = torch.linspace(-1, 1, 32)[:, None]
        >>> model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> optimizer = GRNG(model, variant="kalman")
        >>> for step in range(30):
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(model(x), x**2).backward()
        ...     optimizer.step()
        >>> near, far = (optimizer.posterior.linearised(at).model_variance.item() for at in (x[:1] * 0, x[:1] * 4))
        >>> near < far
        True
    """

    def __init__(self, optimizer: "GRNG") -> None:
        self._optimizer = optimizer
        self._held = optimizer._model()  # which the optimizer itself does not keep alive

    def _scale(self, temperature: float, data_size: float | None) -> float:
        if not (finite(temperature) and temperature > 0):
            raise invalid("temperature", temperature, "a finite number > 0")
        if data_size is None:
            return float(temperature)
        if not (finite(data_size) and data_size > 0):
            raise invalid("data_size", data_size, "a finite number > 0, or None")
        return float(temperature) * self.seen / data_size

    @property
    def seen(self) -> float:
        """n_eff: how many samples the covariance holds the information of."""
        return float(torch.stack([s.amax() for s in self._method().seen.stacks]).amax())

    def _precisely(self) -> AbstractContextManager[None]:
        """Where the user's autocast does not reach."""
        return full_precision(self._optimizer._device)

    def _named(self, stacks: list[Tensor]) -> ByName:
        """Group stacks (k, n_out, n_in) as tensors by parameter name."""
        views = (pair for layer in self._covered() for pair in layer.views(stacks[layer.group][layer.slots]))
        return {self._optimizer._names[p]: part for p, part in views}

    @property
    def mean(self) -> ByName:
        """The parameters themselves, by name: copies."""
        return {name: p.detach().clone() for p, name in self._trained()}

    def _trained(self) -> list[tuple[nn.Parameter, str]]:
        optimizer = self._optimizer
        return [(p, optimizer._names[p]) for group in optimizer.param_groups for p in group["params"]]

    def variance(self, temperature: float = 1.0, data_size: float | None = None) -> ByName:
        """Marginal variances of the covered parameters, by name."""
        scale = self._scale(temperature, data_size)
        with self._precisely():
            stacks = self._method().variance()
        return {name: scale * part for name, part in self._named(stacks).items()}

    def sample(
        self, generator: torch.Generator | None = None, temperature: float = 1.0, data_size: float | None = None
    ) -> ByName:
        """One draw of all parameters, by name; those that are not covered at their mean."""
        scale = self._scale(temperature, data_size) ** 0.5
        with self._precisely():
            drawn = self._named(self._method().draw(generator))
        return {
            name: mean + (scale * drawn[name]).to(mean.dtype) if name in drawn else mean
            for name, mean in self.mean.items()
        }

    @contextmanager
    def sampled(
        self, generator: torch.Generator | None = None, temperature: float = 1.0, data_size: float | None = None
    ) -> Iterator[ByName]:
        """Inside, the model holds a draw of its parameters; afterwards its own, to the bit, whatever happened.

        Forward and backward passes inside are not measured.
        """
        draw = self.sample(generator, temperature, data_size)
        saved = [(p, p.detach().clone(), draw[name]) for p, name in self._trained()]

        def move(values: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
            with torch.no_grad():
                for p, value in values:
                    p.copy_(value)
            torch.clear_autocast_cache()  # an autocast around this keeps casts of the weights

        try:
            move((p, value) for p, _, value in saved)
            with self._optimizer.paused():
                yield draw
        finally:
            move((p, value) for p, value, _ in saved)

    # Predictions.

    @torch.no_grad()
    def predict(
        self,
        x: Any,
        samples: int = 32,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        data_size: float | None = None,
    ) -> Prediction:
        """The mean over draws of the parameters: of softmax or sigmoid probabilities, or of a regression's output.

        Args:
            x: what the model is called with.
            samples: how many draws.
        """
        if type(samples) is not int or samples < 1:
            raise invalid("samples", samples, "a whole number >= 1")
        model, total, squares = self._model(), None, None
        for _ in range(samples):
            with self.sampled(generator, temperature, data_size), evaluating(model):
                value = self._link(output(model(x)))
            total = value if total is None else total + value
            squares = value.square() if squares is None else squares + value.square()
        assert total is not None
        assert squares is not None
        mean = total / samples
        return self._prediction(mean, (squares / samples - mean.square()).clamp(min=0))

    def linearised(self, x: Any, temperature: float = 1.0, data_size: float | None = None) -> Prediction:
        r"""The model linearised at its mean, without draws: every output is N(f(x), v^T P v), v its gradient.

        Probabilities are those at the mean output, shrunk by its variance: softmax(f / sqrt(1 + pi/8 v)) (MacKay 1992).
        One backward pass for every output of a sample, none of which forms a gradient of a single sample.

        Args:
            x: what the model is called with.
        """
        model, scale = self._model(), self._scale(temperature, data_size)
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "linearised() takes derivatives, which torch.inference_mode() forbids: leave it out, or take predict()"
            )
        with evaluating(model):
            f, spread = self._spread(model, x)
        spread = scale * spread
        if self._likelihood() in ("categorical", "bernoulli"):
            return self._prediction(self._link(f / (1 + torch.pi / 8 * spread).sqrt()), spread)
        return self._prediction(f, spread)

    def _spread(self, model: nn.Module, x: Any) -> tuple[Tensor, Tensor]:
        """The outputs, and v^T P v for each."""
        method, covered = self._method(), self._covered()
        f, gradients = self._optimizer._capture.probe(model, x)
        if self._optimizer._capture.order.axis:
            raise TypeError("the model's output has positions before samples: use predict()")
        spread = torch.zeros_like(f)
        if f.ndim == 0:
            raise TypeError("the model returned a scalar: it has to return one output or several for every sample")
        flat = spread.view(len(f), -1)
        for output_ in range(flat.shape[1]):
            cotangent = torch.zeros_like(flat)
            cotangent[:, output_] = 1.0
            # Of a layer that is used more than once, the gradients add up.
            uses: dict[Layer, list[Columns]] = {}
            for layer, statistics in gradients(cotangent.view_as(f)):
                if layer in covered:
                    if statistics.samples != len(f) or layer.order == ROWS:
                        raise TypeError(f"layer {layer.name!r} does not see the samples one by one: use predict()")
                    uses.setdefault(layer, []).append(statistics.columns())
            with self._precisely():
                for layer, found in uses.items():
                    flat[:, output_] += method.spread(layer, type(found[0]).joined(found, 2)).to(f.dtype)
        plain = [layer for layer in covered if layer.plain]
        return f, spread + self._plain_spread(model, x, f, plain) if plain else spread

    def _plain_spread(self, model: nn.Module, x: Tensor, f: Tensor, plain: list[Layer]) -> Tensor:
        """The share of parameters outside of layers, from Jacobians of 64 samples at a time."""
        variances = self.variance()
        moving = {self._optimizer._names[layer.owner]: layer.owner.detach() for layer in plain}
        fixed = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers()) if n not in moving}

        def outputs(values: ByName, sample: Tensor) -> Tensor:
            return output(functional_call(model, {**fixed, **values}, (sample.unsqueeze(0),))).squeeze(0)

        jacobians = vmap(jacrev(outputs), in_dims=(None, 0), chunk_size=64)(moving, x)
        parts = [(J.square() * variances[name]).flatten(f.ndim).sum(-1) for name, J in jacobians.items()]
        return torch.stack(parts).sum(0).to(f.dtype)

    def _method(self) -> "Kalman":
        return cast("Kalman", self._optimizer._preconditioner)

    def _covered(self) -> set[Layer]:
        optimizer = self._optimizer
        return {layer for layer in optimizer._layers if layer.active and layer in optimizer._observed}

    def _model(self) -> nn.Module:
        if self._held is None:
            raise RuntimeError("the model of this optimizer is gone")
        return self._held

    def _likelihood(self) -> str:
        likelihood = self._optimizer._capture.fisher.likelihood
        return "gaussian" if likelihood is None else likelihood.name

    def _link(self, f: Tensor) -> Tensor:
        name = self._likelihood()
        if name == "categorical":
            return torch.softmax(f, self._optimizer._capture.fisher.likelihood.class_dim)  # type: ignore[union-attr]
        return torch.sigmoid(f) if name == "bernoulli" else f

    def _prediction(self, mean: Tensor, model_variance: Tensor) -> Prediction:
        if self._likelihood() != "gaussian":
            dim = getattr(self._optimizer._capture.fisher.likelihood, "class_dim", -1)
            return Prediction(mean, model_variance, model_variance, self._likelihood(), dim)
        R = self.noise.to(mean.dtype)
        return Prediction(mean, model_variance + (R if R.ndim == 0 else R.diagonal()), model_variance)

    @property
    def noise(self) -> Tensor:
        """R of a Gaussian likelihood: (), or (C, C) over the outputs."""
        found = self._optimizer._capture.fisher.noise.value
        if found is None:
            raise RuntimeError("no step was made on a squared error yet, so that no noise is known: make a step first")
        return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the modules are in evaluation mode; afterwards each in its own, by its own train(), which may do more."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parents before children
            if module.training != training:
                module.train(training)


def output(value: Any) -> Tensor:
    """The tensor that the loss is computed from, with or without a graph."""
    if isinstance(value, Tensor):
        return value
    found = find_output(value)
    if found is None:
        raise TypeError(f"the model returned {type(value).__name__}, in which no output was found")
    return found
