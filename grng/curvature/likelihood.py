"""Likelihoods: what the gradient at the model's output reveals, and gradients with labels drawn from the model.

A *prediction* is one categorical row, or one element for the Bernoulli and the Gaussian. For the loss summed over
predictions, the gradient at the output f is

    categorical, f logits:             p - onehot(y),  p = softmax(f)
    categorical, f log-probabilities:  -onehot(y)
    Bernoulli, f logits:               sigma(f) - y
    Gaussian:                          2 (f - y)              (squared error: R = 1/2)

and the user's loss divides it by a normaliser N: the number of predictions for reduction="mean", 1 for "sum", anything
under loss scaling. Where the labels are hard, N can be read off the arriving gradient; a Bernoulli's also where only
some are (grey pixels, of which many are black). Rows of zeros are padding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SATURATED = 1e-3  # sigma(f) this close to an end: rounding hides what is left
SOME, FEW = 0.01, 4  # of all targets have to be 0 or 1, and that many at least


@dataclass
class Reading:
    """What an arriving gradient reveals: N, the number of predictions, and the relative misfit of the likelihood."""

    normaliser: Tensor
    predictions: Tensor
    misfit: Tensor


class Likelihood:
    """Common part: outputs are seen as rows of the last dimension; `class_dim` says where classes are before that."""

    name = ""
    fits_any = 0  # a gradient of no more numbers than that is matched by some label, whatever they are
    elementwise = False  # every element of the output is a prediction

    def __init__(self, class_dim: int = -1) -> None:
        self.class_dim = class_dim

    def rows(self, f: Tensor) -> Tensor:
        """(..., C) in at least float32, classes last."""
        f = f.unsqueeze(-1) if f.ndim < 2 else f.movedim(self.class_dim, -1)
        return f.to(torch.promote_types(f.dtype, torch.float32))

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """A gradient in the shape and dtype of the output."""
        rows = rows.squeeze(-1) if like.ndim < 2 else rows.movedim(-1, self.class_dim)
        return rows.to(like.dtype)

    def read(self, f: Tensor, gradient: Tensor) -> Reading:
        """N by least squares: the e with hard labels that fits, N = <e, e> / <e, dL/df>."""
        f, g = self.rows(f), self.rows(gradient)
        valid = (g != 0).any(-1, keepdim=True)
        e = torch.where(valid, self._unit(f, g), 0)
        normaliser = e.square().sum() / (e * g).sum()
        misfit = (e / normaliser - g).norm() / g.norm()
        return Reading(normaliser, self._count(valid, f), torch.nan_to_num(misfit, nan=torch.inf))

    def sample(self, f: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient at the output, of the summed loss, with every label drawn from the model."""
        rows = self.rows(f)
        valid = (self.rows(gradient) != 0).any(-1, keepdim=True)
        return self.back(torch.where(valid, self._draw(rows, generator), 0), f)

    def numbers(self, f: Tensor) -> int:
        """How many random numbers `sample` takes: one an element, unless a class says otherwise."""
        return f.numel()

    def columns(self, f: Tensor, gradient: Tensor) -> Iterator[Tensor]:
        """Gradients whose outer products sum to the exact curvature S at the output: one per output and position."""
        rows = self.rows(f)
        valid = (self.rows(gradient) != 0).any(-1, keepdim=True)
        samples = rows.shape[0]
        root = torch.where(valid.unsqueeze(-1), self._root(rows), 0).view(samples, -1, *([rows.shape[-1]] * 2))
        for position in range(root.shape[1]):
            for column in range(root.shape[-1]):
                e = torch.zeros_like(root[..., 0])
                e[:, position] = root[:, position, :, column]
                yield self.back(e.view(rows.shape), f)

    def _count(self, valid: Tensor, f: Tensor) -> Tensor:
        """Predictions among the valid rows: one an element, unless a class says otherwise."""
        return valid.sum().to(f.dtype) * f.shape[-1]

    def _unit(self, f: Tensor, g: Tensor) -> Tensor:
        raise NotImplementedError

    def _draw(self, f: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def _root(self, f: Tensor) -> Tensor:
        """(..., C, C) R with R R^T = S."""
        raise NotImplementedError


def _onehot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.one_hot(index, classes).to(dtype)


def _uniform(like: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    # Uniform numbers and inverse distribution functions: a batch split in two then draws what the whole batch draws.
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


class Categorical(Likelihood):
    name = "categorical"
    fits_any = 2

    def _unit(self, f: Tensor, g: Tensor) -> Tensor:
        return torch.softmax(f, -1) - _onehot(g.argmin(-1), f.shape[-1], f.dtype)  # only the true class has p - 1 < 0

    def _draw(self, f: Tensor, generator: torch.Generator) -> Tensor:
        p = torch.softmax(f, -1)
        threshold = _uniform(f, f.shape[:-1], generator).unsqueeze(-1) * p.sum(-1, keepdim=True)
        label = (p.cumsum(-1) <= threshold).sum(-1).clamp(max=f.shape[-1] - 1)
        return p - _onehot(label, f.shape[-1], f.dtype)

    def numbers(self, f: Tensor) -> int:
        return self.rows(f)[..., 0].numel()

    def _root(self, f: Tensor) -> Tensor:
        p = torch.softmax(f, -1)
        return torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)

    def _count(self, valid: Tensor, f: Tensor) -> Tensor:
        return valid.sum().to(f.dtype)


class LogCategorical(Categorical):
    """The model ends in log_softmax; the loss is nll_loss."""

    fits_any = 0

    def _unit(self, f: Tensor, g: Tensor) -> Tensor:
        return -_onehot(g.argmin(-1), f.shape[-1], f.dtype)

    def _draw(self, f: Tensor, generator: torch.Generator) -> Tensor:
        return super()._draw(f, generator) - torch.softmax(f, -1)

    def _root(self, f: Tensor) -> Tensor:
        return torch.diag_embed(
            torch.softmax(f, -1).sqrt()
        )  # E[onehot onehot^T]; log_softmax's own gradient centres it


class Bernoulli(Likelihood):
    name = "bernoulli"
    fits_any = 1
    elementwise = True

    def _unit(self, f: Tensor, g: Tensor) -> Tensor:
        return torch.sigmoid(f) - (g < 0).to(f.dtype)

    def _draw(self, f: Tensor, generator: torch.Generator) -> Tensor:
        p = torch.sigmoid(f)
        return p - (_uniform(f, f.shape, generator) < p).to(f.dtype)

    def _root(self, f: Tensor) -> Tensor:
        p = torch.sigmoid(f)
        return torch.diag_embed((p * (1 - p)).sqrt())


class SoftBernoulli(Bernoulli):
    """Targets anywhere in [0, 1], some of them at its ends."""

    def read(self, f: Tensor, gradient: Tensor) -> Reading:
        """N is the largest for which y = sigma(f) - N g is in [0, 1] everywhere; it fits where many y are 0 or 1."""
        g = self.rows(gradient)
        p = torch.sigmoid(self.rows(f))
        most = torch.where(g > 0, p, 1 - p)  # of N |g|
        counts = (g != 0) & (most > SATURATED)
        ratio = torch.where(counts, most / g.abs(), torch.inf)
        normaliser = ratio.amin()
        hard = (ratio < normaliser * (1 + tolerance(f, gradient))).sum()
        misfit = torch.where(hard >= (SOME * counts.sum()).clamp(min=FEW), 0.0, torch.inf).to(g.dtype)
        return Reading(normaliser, self._count((g != 0).any(-1, keepdim=True), g), misfit)


class Gaussian(Likelihood):
    name = "gaussian"
    elementwise = True

    def read(self, f: Tensor, gradient: Tensor) -> Reading:
        """A squared error's normaliser cannot be read off its gradient: that of reduction="mean" is assumed."""
        g = self.rows(gradient)
        predictions = self._count((g != 0).any(-1, keepdim=True), g)
        return Reading(predictions, predictions, torch.zeros_like(predictions))

    def residuals(self, gradient: Tensor, normaliser: Tensor) -> Tensor:
        """(n, C) f - y of the gradient 2 (f - y) / N."""
        g = self.rows(gradient)
        return (g * normaliser / 2).reshape(-1, g.shape[-1])

    def _draw(self, f: Tensor, generator: torch.Generator) -> Tensor:
        u = _uniform(f, f.shape, generator)
        eps = torch.finfo(u.dtype).eps
        return 2**0.5 * torch.special.ndtri(u.clamp(eps, 1 - eps))  # variance of 2 (f - y) under R = 1/2 is 2

    def _root(self, f: Tensor) -> Tensor:
        return torch.diag_embed(torch.full_like(f, 2**0.5))


class Unread(Likelihood):
    """A loss that is none of the others, so that no label can be drawn: one prediction a row, their mean assumed."""

    name = "none"

    def read(self, f: Tensor, gradient: Tensor) -> Reading:
        g = self.rows(gradient)
        predictions = (g != 0).any(-1).sum().to(g.dtype)
        return Reading(predictions, predictions, torch.zeros_like(predictions))


def tolerance(*tensors: Tensor) -> float:
    """Largest relative error that rounding explains, by the least precise of the tensors."""
    return min(0.1, 1e3 * max(torch.finfo(t.dtype).eps for t in tensors) ** 0.75)


def detect(f: Tensor, gradient: Tensor) -> tuple[Likelihood, str] | None:
    """The likelihood that the arriving gradient fits, or `Unread`, and why. Called once: it looks at values.

    Returns:
        None where outputs are all zero, as those of a last layer that begins so, and the gradient of one size
        everywhere: probabilities of 1/2 fit that, and an absolute error does.
    """
    dims = [dim for dim in ([-1] if f.ndim < 3 else [-1, 1]) if f.ndim > 1 and f.shape[dim] > 1]
    candidates: list[Likelihood] = [kind(dim) for dim in dims for kind in (Categorical, LogCategorical)]
    candidates.append(Bernoulli())
    limit = tolerance(f, gradient)
    for likelihood in candidates:
        if isinstance(likelihood, LogCategorical):
            total = likelihood.rows(f).exp().sum(-1)
            if float((total - 1).abs().max()) > 10 * limit:
                continue
        reading = likelihood.read(f, gradient)
        if float(reading.misfit) < limit:
            usual = (1.0, float(likelihood.read(f, torch.ones_like(f)).predictions))  # of a sum, and of a mean over all
            known = any(abs(float(reading.normaliser) / n - 1) < limit for n in usual)
            if isinstance(likelihood, Bernoulli) and not known and not bool(f.any()):
                return None
            if int((gradient != 0).sum()) <= likelihood.fits_any and not known:
                return Unread(likelihood.class_dim), (
                    "the first output gradient is a single number, which fits any likelihood at some scale: "
                    "declare Curvature(likelihood=...)"
                )
            return likelihood, "read off the output gradient"
    soft = SoftBernoulli().read(f, gradient)
    divisors = (1.0, float(soft.predictions), float(len(f)))  # of a sum, a mean over all, a mean of samples' sums
    if float(soft.misfit) < limit and any(abs(float(soft.normaliser) / n - 1) < limit for n in divisors):
        return SoftBernoulli(), "read off the output gradient: soft targets in [0, 1]"
    # An unbatched output is a row too.
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    for dim in dims or [-1] * (f.ndim == 1 and len(f) > 1):
        if float(g.sum(dim).norm()) < limit * float(g.norm()):
            return Unread(dim), (
                "the output gradient sums to zero over the classes, but is not that of cross-entropy with hard labels "
                "on a batch (label smoothing, soft targets, class weights, a second loss term, or no batch dimension)"
            )
    return Gaussian(), "assumed: a squared error with reduction='mean' cannot be told from its gradient"


def declared(name: str, f: Tensor, gradient: Tensor) -> Likelihood:
    """The likelihood that the user named, with the class dimension and the link that fit best."""
    if name == "bernoulli":
        return min(Bernoulli(), SoftBernoulli(), key=lambda c: float(c.read(f, gradient).misfit))
    if name == "gaussian":
        return Gaussian()
    candidates: list[Likelihood] = [Categorical(), LogCategorical()]
    if f.ndim > 2:
        candidates += [Categorical(1), LogCategorical(1)]
    return min(candidates, key=lambda c: float(c.read(f, gradient).misfit))


# Codes under which a likelihood is kept in a checkpoint.
CODES: tuple[tuple[type[Likelihood], int], ...] = (
    (Categorical, -1),
    (Categorical, 1),
    (LogCategorical, -1),
    (LogCategorical, 1),
    (Bernoulli, -1),
    (Gaussian, -1),
    (Unread, -1),
    (Unread, 1),
    (SoftBernoulli, -1),
)
