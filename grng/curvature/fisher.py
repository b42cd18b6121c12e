"""Whose labels enter the Fisher, and how the loss is normalised: read off the gradient at the model's output."""

import warnings
from collections.abc import Iterator
from zlib import crc32

import torch
from torch import Tensor

from grng.curvature.config import Curvature
from grng.curvature.likelihood import (
    CODES,
    Categorical,
    Gaussian,
    Likelihood,
    Reading,
    Unread,
    declared,
    detect,
    tolerance,
)
from grng.curvature.noise import Noise
from grng.curvature.passes import Batch
from grng.distributed import Processes
from grng.errors import GRNGWarning, invalid

MODIFIED = "the model's output was modified in place before the loss"


class FisherReader:
    """Settles the likelihood by the first gradient that shows it, reads N off every later one, and draws labels.

    Attributes:
        likelihood: None until it is settled.
        reason: how it was found, in words.
        decided: whether it is settled.
        empirical: whether true labels are used, by the settings or because no label can be drawn.
        processes: those that train the model together, where they are several: they settle everything alike.
        scale: what the loss is known to be multiplied by before its backward pass, by a GradScaler.
        blind: whether the last N was assumed, and says nothing of such a scale.
    """

    def __init__(self, config: Curvature) -> None:
        self.config = config
        self.likelihood: Likelihood | None = None
        self.reason = "not seen yet"
        self.decided = False
        self.empirical = config.fisher == "empirical"
        self.noise = Noise(config.noise, config.ema)
        self.processes: Processes | None = None
        self.scale: Tensor | None = None
        self.blind = False
        self._drawn = 0  # random numbers that were taken since the processes last agreed
        self._loss_scale: Tensor | None = None  # predictions / N, of the last gradient that fitted the likelihood
        self._generators: dict[torch.device, torch.Generator] = {}

    def _decide(self, f: Tensor, gradient: Tensor, intact: bool) -> bool:
        """Settle the likelihood by the first gradient that is finite and not zero: the only look at values."""
        size = float(gradient.norm())
        if not 0 < size < float("inf"):
            return False
        name = self.config.likelihood
        if f.ndim == 0:
            self.likelihood = Unread()
            self.fall_back("the model returns a scalar: its outputs are not seen", self.config.likelihood != "auto")
        elif not intact:
            self.likelihood = Unread()
            self.fall_back(MODIFIED)
        elif name == "auto":
            found = detect(f, gradient)
            if found is None:
                return False  # the next output tells more
            self.likelihood, self.reason = found
            if isinstance(self.likelihood, Unread):
                self.fall_back(self.reason)
        else:
            self.likelihood, self.reason = declared(name, f, gradient), "declared"
            misfit = float(self.likelihood.read(f, gradient).misfit)
            if misfit > tolerance(f, gradient) and self.config.loss_scale is None:
                self.fall_back(
                    f"the output gradient does not fit the declared likelihood {name!r} with hard labels "
                    f"(relative misfit {misfit:.2g})"
                )
        self.decided = True
        self._check_loss_scale(f, gradient)
        return True

    def _check_loss_scale(self, f: Tensor, gradient: Tensor) -> None:
        """A declared scale that the gradient contradicts is an error, where it can be read off."""
        scale, likelihood = self.config.loss_scale, self.likelihood
        if scale is None or likelihood is None or isinstance(likelihood, Gaussian | Unread):
            return
        reading = likelihood.read(f, gradient)
        if float(reading.misfit) > tolerance(f, gradient):
            return  # soft labels: nothing can be read
        found = float(reading.predictions / reading.normaliser) / (1.0 if self.scale is None else float(self.scale))
        told = float(reading.predictions) if scale == "sum" else float(scale)
        if abs(found - told) > 0.01 * abs(told):
            raise invalid(
                "loss_scale",
                scale,
                f"{found:.6g}, which the output gradient shows for this {likelihood.name} loss",
                "Leave loss_scale=None to have it read off.",
            )

    def fall_back(self, why: str, warn: bool = True) -> None:
        """Use true labels from now on, and say why."""
        self.empirical = True
        self.reason = f"empirical Fisher instead: {why}"
        if warn and self.config.fisher != "empirical":
            warnings.warn(f"GRNG uses the empirical Fisher: {why}", GRNGWarning, stacklevel=2)

    def read(self, f: Tensor, gradient: Tensor, intact: bool) -> Reading | None:
        """N and the number of predictions; under the fallback, of a mean over the rows that receive a gradient.

        Args:
            f: the model's output.
            gradient: dL/df, as it arrives.
            intact: whether the output is as the model returned it.

        Returns:
            None where the gradient is zero or not finite and nothing was settled before.
        """
        if not self.decided:
            self._decide(f, gradient, intact)
            if self.processes is not None:
                self._settle_together(self.processes, gradient.device)
            if not self.decided:
                return None
        if not intact and not self.empirical:
            self.fall_back(MODIFIED)
        likelihood = self.likelihood
        assert likelihood is not None
        if isinstance(likelihood, Categorical) and f.shape[likelihood.class_dim] < 2 and not self.empirical:
            self.fall_back(
                f"the likelihood is {likelihood.name!r}, and an output of a single class came: a model of several "
                "kinds of outputs needs an optimizer, or a variant without a Fisher, for each"
            )
        reading = likelihood.read(f, gradient)
        scale = self.config.loss_scale
        if scale is not None:
            one = torch.ones_like(reading.predictions)
            reading.normaliser = one if scale == "sum" else reading.predictions / scale
        elif not isinstance(likelihood, Gaussian | Unread):
            # Where everything is predicted right, rounding hides N in the gradient: what was read before holds on.
            known = torch.ones_like(reading.misfit) if self._loss_scale is None else self._loss_scale.to(reading.misfit)
            trusted = (reading.misfit < tolerance(f, gradient)) & intact
            self._loss_scale = torch.where(trusted, reading.predictions / reading.normaliser, known)
            reading.normaliser = reading.predictions / self._loss_scale
        assumed = scale is not None or isinstance(likelihood, Gaussian | Unread)
        self.blind = assumed and self.scale is None
        if assumed and self.scale is not None:
            reading.normaliser = reading.normaliser / self.scale.to(reading.normaliser)
        if isinstance(likelihood, Gaussian):
            self.noise.begin(gradient)
            if self.noise.estimated:
                e = likelihood.residuals(gradient, reading.normaliser)
                self.noise.observe(e, (e != 0).any(-1, keepdim=True), self.processes)
            reading.normaliser = reading.normaliser * self.noise.information()
        return reading

    def outputs(self, batch: Batch) -> Tensor:
        """How many predictions the trust region takes as one: all elements of a sample, or one categorical row."""
        together = self.likelihood is not None and self.likelihood.elementwise
        return (
            (batch.predictions / max(batch.samples, 1)).clamp(min=1) if together else torch.ones_like(batch.predictions)
        )

    def weighted(self, f: Tensor, gradient: Tensor) -> Tensor | None:
        """The gradient at the output of the loss under R, where that is another one."""
        likelihood = self.likelihood
        if not self.noise.weights or self.noise.value is None or not isinstance(likelihood, Gaussian):
            return None
        return likelihood.back(self.noise.weighted(likelihood.rows(gradient)), f)

    def cotangents(self, f: Tensor, gradient: Tensor) -> Iterator[Tensor]:
        """Gradients at the output that the nested backward passes start from; none under the empirical Fisher."""
        assert self.likelihood is not None
        if self.empirical:
            return
        if self.config.fisher == "exact":
            yield from (self._scored(e) for e in self.likelihood.columns(f, gradient))
            return
        for _ in range(self.config.draws):
            yield self.sample(f, gradient) / self.config.draws**0.5

    def sample(self, f: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at the output, of the summed loss, with labels drawn from the model."""
        assert self.likelihood is not None
        generator, processes = self.generator(f.device), self.processes
        if processes is None:
            return self._scored(self.likelihood.sample(f, gradient, generator))
        # All go through the same numbers and each takes its own, in the order of their parts of the batch: as one
        # process does for the whole batch (on a CPU, where the parts are of one size and come in one backward pass).
        count, dtype = self.likelihood.numbers(f), torch.promote_types(f.dtype, torch.float32)

        def skip(others: int) -> None:
            torch.rand(others * count, generator=generator, dtype=dtype, device=f.device)

        skip(processes.rank)
        e = self.likelihood.sample(f, gradient, generator)
        skip(processes.size - processes.rank - 1)
        self._drawn += processes.size * count
        return self._scored(e)

    def _scored(self, e: Tensor) -> Tensor:
        likelihood = self.likelihood
        if not isinstance(likelihood, Gaussian):
            return e
        return likelihood.back(self.noise.scores(likelihood.rows(e)), e)

    def generator(self, device: torch.device) -> torch.Generator:
        """The source of drawn labels on a device; apart from the user's own random numbers."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.config.seed)
        return self._generators[device]

    # Several processes.

    def _settle_together(self, processes: Processes, device: torch.device) -> None:
        """The likelihood that the first of them found; and none if one of them found that none fits."""
        own = torch.tensor([float(self.decided), float(self.empirical), float(self._code)], device=device)
        rows = processes.rows(own)
        processes.sum_([rows])
        found = [(empirical, code) for decided, empirical, code in rows.tolist() if decided]
        if not found:
            return
        empirical, code = next((each for each in found if each[0]), found[0])
        if not self.decided or code != self._code:
            kind, dim = CODES[int(code)]
            self.likelihood, self.reason = kind(dim), "as another process read it"
        if empirical and not self.empirical:
            self.fall_back("another process found no likelihood that fits")
        self.decided = True

    def report(self, device: torch.device) -> Tensor:
        """What the processes have to agree on at every step with statistics, (3,)."""
        scale = torch.zeros((), device=device) if self._loss_scale is None else self._loss_scale
        numbers = torch.tensor([self.empirical, self._drawn], dtype=torch.float64, device=device)
        return torch.cat([numbers, scale.to(numbers).view(1)])

    def agree(self, processes: Processes, rows: Tensor) -> None:
        """Take over from all reports, (processes, 3), what is to be the same everywhere."""
        empirical, drawn, scales = rows.unbind(1)
        if bool(empirical.any()) and not self.empirical:
            self.fall_back("another process cannot draw labels")
        known = scales > 0
        if self._loss_scale is not None:
            self._loss_scale = (scales.sum() / known.sum().clamp(min=1)).to(self._loss_scale)
        if len(set(drawn.tolist())) > 1:  # parts of different sizes: all go on from where one of them has got to
            generator = self.generator(rows.device)
            states = processes.gather({"state": generator.get_state().to(rows.device)}, rows.device)
            generator.set_state(states[int(drawn.argmax())]["state"].cpu())
        self._drawn = 0

    @property
    def _code(self) -> int:
        return next((i for i, (kind, dim) in enumerate(CODES) if self._is(kind, dim)), -1)

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """What a resumed run needs: the drawn labels' source, and what was decided about the likelihood."""
        flags = torch.tensor([self._code, int(self.decided), int(self.empirical)])
        one = torch.ones((), dtype=torch.float64, device=device)
        scale = one if self._loss_scale is None else self._loss_scale
        return {
            "fisher_rng": self.generator(device).get_state(),
            "likelihood": flags,
            "loss_scale": scale,
            **self.noise.state(),
        }

    def lacks(self, state: dict[str, Tensor]) -> bool:
        """Whether a checkpoint says that a noise was estimated, and not which."""
        code = int(state["likelihood"][0])
        return self.noise.weights and code >= 0 and CODES[code][0] is Gaussian and "noise" not in state

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        generator, saved = self.generator(device), state["fisher_rng"].cpu()
        if saved.shape == generator.get_state().shape:
            generator.set_state(saved)
        else:
            generator.manual_seed(crc32(saved.numpy().tobytes()))
            warnings.warn(
                "the checkpoint is of another kind of device: the labels that the Fisher draws are others than there",
                GRNGWarning,
                stacklevel=2,
            )
        code, decided, empirical = (int(v) for v in state["likelihood"])
        self.likelihood = None if code < 0 else CODES[code][0](CODES[code][1])
        self.decided, self.empirical = bool(decided), bool(empirical) or self.config.fisher == "empirical"
        if self.likelihood is not None and self.config.likelihood not in ("auto", self.likelihood.name):
            self.likelihood, self.decided = None, False  # what is declared now holds
            self.empirical = self.config.fisher == "empirical"
        self._loss_scale = state["loss_scale"].to(device, copy=True)
        self.noise.load_state(state)
        self.reason = "as in the checkpoint" if self.decided else "not seen yet"

    def _is(self, kind: type[Likelihood], dim: int) -> bool:
        return type(self.likelihood) is kind and self.likelihood.class_dim == dim
