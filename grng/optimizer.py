"""GRNG: regularise -> capture -> precondition -> trust region -> update."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grng.attached import AttachedOptimizer, check_hyperparameters
from grng.curvature import Curvature, Layer
from grng.damping import Damping, squared_norm
from grng.errors import GRNGWarning, finite, invalid, unknown
from grng.kernels import full_precision
from grng.matrices import inner, largest_shares
from grng.posterior import Posterior
from grng.preconditioners import Kalman, Preconditioner, make_preconditioner
from grng.region import TrustRegion
from grng.regularizers import Explicit, FrontEnd, Regularizer
from grng.regularizers.displacement import RandomState
from grng.regularizers.frontend import as_chain
from grng.regularizers.scaler import under_scaler
from grng.update import Gradients, update_
from grng.variants import check_adaptive, find_variant, resolved_noise, resolved_scale

MODES = ("double", "finite", "ggn")
NORMS = ("global", "layer")
PATIENCE = 3  # measurements in a row that a layer may miss


class GRNG(AttachedOptimizer):
    r"""Gradient-regularized natural gradients, as an ordinary torch optimizer.

    .. math::
        D = -(F + \lambda I)^{-1} g, \qquad m \leftarrow \mu m + \nu D, \qquad
        \theta \leftarrow (1 - \mathrm{lr}\,\mathrm{wd})\,\theta + \mathrm{lr}\, m

    with F the Fisher of the model's own labels in Kronecker blocks. The variants differ in lambda, g and F:

    - ``"ring"``: lambda = rho \|g\|^2 + lam0 (implicit regularisation).
    - ``"reng"``: g + rho H g in place of g, the gradient of L + rho/2 \|g\|^2 (explicit regularisation).
    - ``"kalman"``: an extended Kalman filter with diagonal covariance, regularised in its gain.
    - ``"kfac"``, ``"ekfac"``: rho = 0; constant damping lam0.

    The family, its penalised loss and its quadratic model are published (arXiv 2601.18420); update intervals,
    normalisation, the filter's equations and all defaults are derived here.

    Args:
        model: the model; its `forward` must be what the training loop calls.
        variant: ``"ring"``, ``"reng"``, ``"kalman"``, ``"kfac"`` or ``"ekfac"``.
        params: which parameters to train: tensors, (name, tensor) pairs or param groups; None: all trainable ones.
        lr: learning rate; None: the variant's default. 1 is the natural gradient step where F is exact.
        rho: strength of the regularisation, or ``"auto"``: relative to the curvature and the gradients seen so far.
        strength: with rho="auto", rho in those units; None: the variant's own (docs/variants.md has the table).
        momentum: in [0, 1).
        weight_decay: decoupled, times lr; for parameters without factors times the fallback's rate.
        mode: for reng, how H g is formed: ``"double"`` (exact, needs ``step(closure)``), ``"finite"`` (two gradients,
            needs ``step(closure)``), ``"ggn"`` (F g in place of H g, one pass, no closure).
        norm: whose gradient norm damps: ``"global"`` or each ``"layer"``'s own.
        regularizer: one of `grng.regularizers` or a list of them, which change the gradient before it is
            preconditioned: as `Regularized(GRNG(...), regularizer)` does from outside. Curvature is that of the first
            pass. One that takes passes needs ``step(closure)`` or :meth:`passes`.
        preconditioner: a name or an instance in place of the variant's own.
        curvature: a :class:`Curvature` with the settings of the estimate; None: its defaults.
        fallback: the rule for parameters without factors; ``"adamw"``.
        fallback_lr: its learning rate, by which its weight decay goes too; schedules of `lr` scale it alike.

    Raises:
        ValueError: a setting is out of range, or the model has nothing to train.
        RuntimeError: another GRNG is attached to the model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> x, y = torch.randn(32, 4), torch.randint(3, (32,))
        >>> with GRNG(model, variant="ring") as optimizer:
        ...     for step in range(60):
        ...         optimizer.zero_grad()
        ...         loss = nn.functional.cross_entropy(model(x), y)
        ...         loss.backward()
        ...         optimizer.step()
        >>> bool(loss < 0.6)
        True
    """

    # GradScaler.step then hands on its scale, and a closure can be told from a plain step.
    _step_supports_amp_scaling = True
    skips_nonfinite = True  # by itself, on the device

    def __init__(
        self,
        model: nn.Module,
        variant: str = "ring",
        *,
        params: Iterable[Any] | None = None,
        lr: float | Tensor | None = None,
        rho: float | Literal["auto"] | None = None,
        strength: float | None = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        mode: Literal["double", "finite", "ggn"] | None = None,
        norm: Literal["global", "layer"] = "global",
        regularizer: Regularizer | Iterable[Regularizer] | None = None,
        preconditioner: str | Preconditioner | None = None,
        curvature: Curvature | None = None,
        fallback: Literal["adamw"] = "adamw",
        fallback_lr: float = 1e-3,
    ) -> None:
        parts = find_variant(variant)
        lr = parts.lr if lr is None else lr
        rho = parts.rho if rho is None else rho
        momentum = parts.momentum if momentum is None else momentum
        curvature = Curvature() if curvature is None else curvature
        check_hyperparameters(lr=lr, momentum=momentum, weight_decay=weight_decay, fallback_lr=fallback_lr)
        if not (isinstance(rho, str) and rho == "auto") and not (finite(rho) and rho >= 0):
            raise invalid("rho", rho, 'a finite number >= 0, or "auto"')
        if rho != 0 and parts.regularization is None:
            raise invalid("rho", rho, f"0 for variant {variant!r}", "variant='ring' is kfac with rho.")
        if strength is not None:
            if rho != "auto":
                raise invalid("strength", strength, f"None with rho={rho!r}", "It is the unit-free rho of rho='auto'.")
            if not (finite(strength) and strength >= 0):
                raise invalid("strength", strength, "a finite number >= 0, or None")
            parts = replace(parts, strength=strength)
        if mode is not None and parts.regularization != "penalty":
            raise invalid("mode", mode, f"None for variant {variant!r}", "Only reng has modes.")
        for name, value, choices in (
            ("mode", mode or "double", MODES),
            ("norm", norm, NORMS),
            ("fallback", fallback, ("adamw",)),
        ):
            if value not in choices:
                raise unknown(name, value, choices)
        if not isinstance(curvature, Curvature):
            raise invalid("curvature", curvature, "a grng.Curvature or None")
        if curvature.floor is not None:
            parts = replace(parts, floor=curvature.floor)
        self.variant = variant
        self._mode = (mode or "double") if parts.regularization == "penalty" else None
        self._norm = norm
        which, settings = (parts.preconditioner, parts.settings) if preconditioner is None else (preconditioner, {})
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "fallback_lr": fallback_lr}
        chain = as_chain(regularizer)
        twice = self._penalised or any(part.takes_passes for part in chain)
        method = make_preconditioner(which, **settings)
        if curvature.adapts:
            check_adaptive(parts, method)
        curvature = replace(
            curvature,
            noise=resolved_noise(curvature.noise, method, twice),
            relative_to=resolved_scale(curvature, parts, method, rho),
        )
        self._attach(model, params, defaults, curvature, method, twice)
        self._region = TrustRegion(curvature, parts, self._layers, self._matrices)
        self._damping = Damping(parts, rho, curvature.lam0, self._device, curvature.adapts)
        try:
            self._front = self._make_front(chain)
        except Exception:
            self.close()
            raise

    @property
    def _penalised(self) -> bool:
        """Whether the variant's own penalty takes passes."""
        return self._mode in ("double", "finite")

    def _make_front(self, chain: tuple[Regularizer, ...]) -> FrontEnd:
        if self._penalised:
            if any(part.takes_passes for part in chain):
                remedy = "mode='ggn' of reng takes none, and goes with any."
                raise invalid("regularizer", chain, f"one without passes for reng in mode {self._mode!r}", remedy)
            mode = "double" if self._mode == "double" else "forward"
            damping = self._damping  # not by self, which would be a cycle
            chain = (Explicit(lambda: damping.rho, mode=mode), *chain)
        me = weakref.ref(self)  # no cycle: hooks go with the last reference to the optimizer
        groups = lambda: me().param_groups  # type: ignore[union-attr]  # noqa: E731
        capture = self._capture
        return FrontEnd(chain, groups, self._called, capture.paused, capture.note_gradient, capture.around_passes)

    # The step.

    @property
    def requires_closure(self) -> bool:
        """Whether `step` needs a closure, or :meth:`passes` where it is the gradient that takes further passes."""
        return self._front.requires_passes or self._damping.adapts

    @property
    def hessian_products(self) -> int:
        """How many products with a second derivative were formed so far."""
        return self._front.hessian_products

    @property
    def posterior(self) -> Posterior:
        """What is known of the parameters, and how well: variant "kalman"."""
        if not isinstance(self._preconditioner, Kalman):
            raise TypeError(f"{self._method} keeps no posterior: variant 'kalman' does")
        self._check_open()
        self._follow()
        return Posterior(self)

    def passes(self, scale: Any = None) -> Iterator[AbstractContextManager[None]]:
        """The forward and backward passes of the coming step, each in a `with`: see `grng.regularizers.Regularized`."""
        self._check_open()
        return self._front.passes(scale)

    def _check_open(self) -> None:
        if not self.open:
            raise RuntimeError("this optimizer was closed and no longer sees its model: build GRNG(model, ...) anew")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. An exception before the last, in-place arithmetic on the parameters leaves all as it was.

        Args:
            closure: calls `zero_grad`, the forward pass and `backward`, and returns the loss. Needed by reng in modes
                "double" and "finite" and by `Curvature(damping="levenberg-marquardt")`, taken by all.

        Returns:
            what the closure returned.

        Raises:
            RuntimeError: there is no gradient, or no closure where one is needed, or a closure that returns None; or
                the optimizer was closed.
        """
        self._check_open()
        self._follow()
        with under_scaler(self, closure) as scaled:
            return self._step(closure, scaled)

    def _step(self, closure: Callable[[], Any] | None, scaled: bool) -> Any:
        loss, random = None, None
        if closure is None:
            if self._damping.adapts:
                raise RuntimeError(
                    "damping='levenberg-marquardt' evaluates the loss again after a step: call step(closure) with a "
                    "closure that calls zero_grad(), the forward pass and backward() and returns the loss; or give "
                    "damping as a number or None"
                )
            if self._penalised and not self._front.ready:
                raise RuntimeError(
                    f"variant 'reng' in mode {self._mode!r} takes a second pass: call step(closure) with a closure "
                    "that calls zero_grad(), the forward pass and backward() and returns the loss; or choose mode='ggn'"
                )
            self._front.refuse_missing_passes()
            gradients = self._plain_gradients()
            if scaled:
                # Copies of what would be lost in float16 without the scale.
                gradients = {p: g.float() if g.dtype == torch.float16 else g for p, g in gradients.items()}
                self.note_scale(self._front.unscale_(self, list(gradients.values())))
        else:
            if self._damping.adapts and (self._schedule.t + 1) % self._damping.every == 0:
                random = RandomState([p for group in self.param_groups for p in group["params"]])
            try:
                loss, gradients = self._evaluate(closure)
            except BaseException:
                self._capture.drop()
                self._capture.finish_step(self._due())
                raise
        before = {p: p.detach().clone() for p in gradients} if random else {}
        with torch.no_grad(), full_precision(self._device):
            self._update(gradients)
        self._front.finish()
        if closure is not None and random is not None:
            self._adapt(closure, loss, before, random)
        return loss

    def note_scale(self, scale: Tensor | None) -> None:
        """Tell that the coming step's gradients are those of the loss divided by `scale`, None where nobody knows.

        Raises:
            RuntimeError: what was measured depends on the scale, and it is not known.
        """
        batch, fisher = self._capture.batch, self._capture.fisher
        if batch is None:
            return
        if fisher.blind:  # N is that of the loss without the scale
            if fisher.empirical or fisher.noise.estimated:
                self._capture.drop()
                self._capture.finish_step(self._due())
                raise RuntimeError(
                    f"what the loss was multiplied by cannot be read off this loss ({fisher.reason}), and the size of "
                    "its gradients enters the curvature: take the pass by `for each in optimizer.passes(scaler):` and "
                    "in it `with each: scaler.scale(loss).backward()`; or train without a GradScaler, in bfloat16"
                )
        elif scale is not None:
            # It was read off the scaled loss, and the gradients are unscaled by now.
            batch.normaliser = batch.normaliser * scale.to(batch.normaliser)
        elif self._preconditioner.weighs_sums:
            raise RuntimeError(
                f"preconditioner {self._preconditioner.name!r} weighs the summed gradient, and scaler.unscale_() hides "
                "what the loss was multiplied by: take the pass by `for each in optimizer.passes(scaler):` and in it "
                "`with each: scaler.scale(loss).backward()`, or leave out unscale_()"
            )

    def _evaluate(self, closure: Callable[[], Any]) -> tuple[Any, Gradients]:
        """Run the closure, as often as the regularizers ask for."""
        if self._front.requires_passes:
            return self._front.evaluate(closure)
        with torch.enable_grad():
            loss = closure()
        if loss is None:
            raise RuntimeError("the closure returned None: it must return the loss it called backward() on")
        return loss, self._plain_gradients()

    def _plain_gradients(self) -> Gradients:
        return {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}

    def _update(self, gradients: Gradients) -> None:
        due = self._due()  # in every process alike, which whether this one has collected need not be
        with self._whole():
            gradients = self._front.transform(gradients)
            directions, scale, square_norm, ok = self._directions(gradients)
        if directions is not None:
            update_(self.param_groups, self.state, gradients, directions, ok, self._curvature.factor_dtype)
            torch.clear_autocast_cache()  # one around the whole loop keeps casts of the weights
            self._schedule.note(gradients, self._current if due else None)
        self._scalars["kl_scale"] = scale
        self._scalars["grad_norm"] = square_norm.sqrt()
        self._scalars["skipped"] = self._scalars["skipped"] + ~ok
        self._schedule.t += 1
        self._capture.finish_step(self._due())

    def _directions(self, gradients: Gradients) -> tuple[Gradients | None, Tensor, Tensor, Tensor]:
        """Fold in what was measured, and make directions, none where the step is left out; also nu, ||g||^2 and whether
        the gradient is finite."""
        if not gradients:
            raise RuntimeError("step() found no gradient: call loss.backward() first, on a loss made by this model")
        if self._capture.collecting:
            self._warn_of_freezing()
        self._capture.verify()
        self._share()
        square_norm = squared_norm(list(gradients.values()))
        ok = torch.isfinite(square_norm)
        if self._new_layers() and not bool(ok):  # a look at the value, while there are layers not measured yet:
            self._capture.drop()  # they count as measured from their first finite step on
            return None, self._scalars["kl_scale"], square_norm, ok
        self._refresh(ok)
        self._damping.note(self._preconditioner, square_norm, ok, refreshed=bool(self._current))
        directions, scale = self._precondition(gradients, square_norm, ok)
        if self._capture.processes is not None:
            length = squared_norm(list(directions.values())) if directions else torch.zeros_like(square_norm)
            self._made = torch.nan_to_num(torch.stack([square_norm, length.to(square_norm)]).double())
        return directions, scale, square_norm, ok

    def _adapt(self, closure: Callable[[], Any], loss: Any, before: Gradients, random: RandomState) -> None:
        """Compare how the step from `before` changed the loss with how its quadratic model says it should have."""
        again = self._front.evaluate_again(closure, random)
        with torch.no_grad(), full_precision(self._device):
            start, end = (torch.as_tensor(value).to(self._damping.one) for value in (loss, again))
            actual = torch.where(start.isfinite(), end - start, 0.0)  # of a step that was left out
            if self._capture.processes is not None:
                self._capture.processes.average_([actual])
            precision = self._curvature.factor_dtype
            moved = {p: p.detach().to(precision(p)) - w.to(precision(p)) for p, w in before.items()}
            linear = [torch.sum(p.grad * delta) for p, delta in moved.items() if p.grad is not None]
            taking = self._taking(moved)
            stacks = self._stack(taking, moved, torch.ones_like(actual, dtype=torch.bool)) if taking else []
            quadratic = inner(stacks, self._preconditioner.curvature_product(stacks)) if stacks else actual.new_zeros(1)
            self._damping.adapt(actual, torch.stack(linear).sum() + quadratic.sum() / 2)

    # Curvature.

    def _new_layers(self) -> bool:
        return bool(self._layers) and (not self._observed or not self._fresh <= self._observed)

    def _refresh(self, ok: Tensor) -> None:
        """Fold this step's statistics in; on the device, those of a gradient that is not finite are left out."""
        batch, self._current, self._fresh = self._capture.batch, self._fresh, set()
        if batch is not None:
            self._warn_lost()
        if batch is None or not self._current:
            if self._capture.collecting:
                self._scalars["uncaptured"] = self._scalars["uncaptured"] + 1
                self._warn_unseen()
            self._preconditioner.discard()
            self._current = set()
            return
        batch.valid = ok
        outputs = self._capture.fisher.outputs(batch).to(self._damping.outputs)
        self._damping.outputs = torch.where(ok, outputs, self._damping.outputs)
        self._preconditioner.refresh(batch, self._schedule.decomposes() or not self._current <= self._observed)
        self._shares = None
        self._capture.fisher.noise.fold(ok)
        self._observed |= self._current
        self._scalars["refreshes"] = self._scalars["refreshes"] + 1
        self._scalars["misfit"] = batch.misfit

    def _warn_unseen(self) -> None:
        if self._schedule.t or not any(layer.active for layer in self._layers):
            return
        if not self._capture.entered:
            why = "saw no forward pass of the model that it was given"
            remedy = "the training loop has to call that model itself, not a part of it"
        elif self._capture.unread:
            why = "saw no gradient at the model's output, of which it reads the first tensor that has a graph"
            remedy = 'the model has to return what the loss is made of first, or as "logits"'
        else:
            return
        warnings.warn(
            f"GRNG {why}, so that every parameter follows the first-order fallback: {remedy}", GRNGWarning, stacklevel=4
        )

    def _warn_lost(self) -> None:
        """Say once which layers were measured before and no longer are, though they have gradients."""
        for layer in self._observed:
            if not layer.active or layer in self._current or all(p.grad is None for p in layer.parameters):
                self._missed.pop(layer, None)
            else:
                self._missed[layer] = self._missed.get(layer, 0) + 1
        missed = [layer for layer, times in self._missed.items() if times == PATIENCE]
        lost = [layer for layer in missed if any(p.grad is not None and p.grad.any() for p in layer.parameters)]
        if lost:
            warnings.warn(
                f"GRNG measures nothing any more of {', '.join(layer.name for layer in lost)}, though it has "
                "gradients: its curvature is that of before, and where every step needs it the first-order fallback "
                "trains it. Layers have to be called by their own forward(), and not under checkpointing with "
                "use_reentrant=True",
                GRNGWarning,
                stacklevel=4,
            )

    def _precondition(self, gradients: Gradients, square_norm: Tensor, ok: Tensor) -> tuple[Gradients, Tensor]:
        """Directions of the layers that are measured and take part, and the trust region's nu."""
        taking = self._taking(gradients)
        if not taking:
            return {}, torch.ones((), dtype=torch.float64, device=self._device)
        stacks = self._stack(taking, gradients, ok)
        lam = self._lam(stacks, square_norm)
        if self._mode == "ggn":
            found = self._preconditioner.precondition_penalised(stacks, lam, self._damping.rho)
            if self._region.kl_clip is not None:  # whose form is that of the gradient that was solved for
                stacks = self._preconditioner.penalised(stacks, self._damping.rho)
        else:
            found = self._preconditioner.precondition(stacks, lam)
        # One number a matrix, all groups in one vector. -<D, G> is <D, (F + lam I) D>, whatever solves the system.
        quadratic, squares = -inner(found, stacks), inner(found, found)
        # Where factors have overflowed or are not finite, the matrix stays where it is for this step.
        sound = (quadratic + squares).isfinite()
        known = torch.cat(self._preconditioner.measured()).flatten() & ok
        still = ~(known & sound)
        self._scalars["broken"] = self._scalars["broken"] + (known & still).sum()
        quadratic, squares = quadratic.masked_fill(still, 0), squares.masked_fill(still, 0)
        nu, scale = self._region(self.param_groups, taking, quadratic, squares, self._damping.outputs)
        # Contiguous, and not in place: a preconditioner may hand out what it keeps.
        parts = zip(found, self._matrices.split(nu), self._matrices.split(still), strict=True)
        found = [(D * part.to(D.dtype)).masked_fill_(mask, 0).contiguous() for D, part, mask in parts]
        directions = {
            p: D for layer in taking for p, D in layer.views(found[layer.group][layer.slots]) if p in gradients
        }
        return directions, scale

    def _taking(self, gradients: Gradients) -> list[Layer]:
        """The layers that are measured and take part."""
        measured = self._current if self._preconditioner.every_step else self._observed
        return [
            layer
            for layer in self._layers
            if layer.active and layer in measured and any(p in gradients for p in layer.parameters)
        ]

    def _stack(self, taking: list[Layer], gradients: Gradients, ok: Tensor) -> list[Tensor]:
        """Gradients as stacks (k, n_out, n_in), one a group; zero for layers that take no part."""
        stacks = [torch.zeros(g.size, g.n_out, g.n_in, dtype=g.dtype, device=g.device) for g in self._groups]
        views = [pair for layer in taking for pair in layer.views(stacks[layer.group][layer.slots])]
        views = [(p, view) for p, view in views if p in gradients]
        torch._foreach_copy_([view for _, view in views], [gradients[p].detach() for p, _ in views])
        lost = ~ok
        return [G.masked_fill_(lost, 0) for G in stacks]

    def _lam(self, stacks: list[Tensor], square_norm: Tensor) -> list[Tensor]:
        """The damping per group, (k, 1, 1)."""
        lam = self._damping(self._matrices.of_layers(inner(stacks, stacks)) if self._norm == "layer" else square_norm)
        floor = self._damping.floor
        if self._curvature.relative_to == "layer":
            if self._shares is None:
                self._shares = largest_shares(self._preconditioner.scales()).to(floor)
            lam, floor = lam * self._shares, floor * self._shares
        self._preconditioner.floors = self._matrices.split(floor)
        found = [own.to(G.dtype) for own, G in zip(self._matrices.split(lam), stacks, strict=True)]
        self._scalars["lam"] = found[0].flatten()[0]
        return found
