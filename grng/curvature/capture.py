"""Capture: from the user's own `loss.backward()` to the rows of every layer, with one forward pass.

A hook on the model's output sees dL/df before the backward pass reaches any layer. There the likelihood and the
normaliser are read, labels are drawn, and a nested backward pass delivers the sampled gradients of all layers. The
first time a layer is seen, the pair of the user's own backward pass must reproduce its parameters' gradients: sum over
uses of e x^T == the change of p.grad. A layer where it does not falls to the first-order fallback, visibly.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from grng.curvature.check import SelfCheck, warn
from grng.curvature.config import Curvature
from grng.curvature.delivery import Delivery
from grng.curvature.engines import Hook, HooksEngine, Pair, make_engine
from grng.curvature.fisher import FisherReader
from grng.curvature.layers import STATUS, Layer
from grng.curvature.likelihood import Reading
from grng.curvature.order import ORDERS, RowOrder
from grng.curvature.passes import Batch, Context, Pass, find_output, origin
from grng.curvature.statistics import Statistics
from grng.curvature.ties import Ties
from grng.distributed import Processes, together
from grng.errors import GRNGWarning
from grng.kernels import full_precision

REENTRANT = (
    "labels are drawn by a nested pass, and none goes through activation checkpointing with use_reentrant=True; "
    "use_reentrant=False lets it through"
)


class Capture:
    """Hooks on a model that hand the statistics of its layers to `sink(layer, statistics)`.

    Args:
        model: the model whose forward pass the user calls.
        layers: the layers to capture.
        config: the settings.
        sink: called for every use of every layer, inside the backward pass.
        twice: whether a step takes a second pass.
        dropped: called by :meth:`drop`, to let go of what the sink has kept.
        entered: called as a forward pass begins that is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        config: Curvature,
        sink: Callable[[Layer, Statistics], None],
        twice: bool = False,
        dropped: Callable[[], None] = lambda: None,
        entered: Callable[[], None] = lambda: None,
    ) -> None:
        self.layers, self.config, self._dropped, self._entered = layers, config, dropped, entered
        self.collecting = True
        self._thread = threading.local()
        self.entered = False  # whether a forward pass was ever seen
        self.batch: Batch | None = None
        self.fisher = FisherReader(config)
        self._busy = False
        self._ties = Ties(layers, Hook(self, "drop"))
        self._probed: tuple[Pass, Tensor] | None = None  # the last forward pass, where only that is wanted
        self._probing = False
        self._unreadable = False  # the step's output gradient is zero or not finite: there is nothing to check against
        self._check = SelfCheck()
        self.order = RowOrder(any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()))
        self._deliver = Delivery(config, self.fisher, self._check, sink)
        self.engine, self.engine_reason = make_engine(config.capture, self, model, twice)
        self._handles = [
            model.register_forward_pre_hook(Hook(self, "_enter")),
            model.register_forward_hook(Hook(self, "_leave"), always_call=True),
            # Says on every part that the model is taken, and costs no pass.
            *[module.register_state_dict_pre_hook(Hook(self, "_taken")) for module in model.modules()],
        ]
        self._check_handles = [
            p.register_post_accumulate_grad_hook(Hook(self, "_note_gradient"))
            for layer in layers
            for p in layer.parameters
        ]

    # The forward pass.

    @property
    def current(self) -> Pass | None:
        """The forward pass that runs in this thread; another may evaluate the model meanwhile."""
        return getattr(self._thread, "current", None)

    @current.setter
    def current(self, current: Pass | None) -> None:
        self._thread.current = current

    def _enter(self, module: nn.Module, args: Any) -> None:
        # Under torch.func the tensors are wrapped, and gradients are not those of a training step.
        transformed = torch._C._functorch.maybe_current_level() is not None
        if not self.collecting or self._busy or transformed or not torch.is_grad_enabled():
            self.current = None
            return
        self._entered()
        given = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
        self.current, self.entered = Pass(given=given), True
        if self.fisher.processes is None:
            self.fisher.processes = together()
        self.engine.begin()
        if self._probing:
            return
        for layer in self.layers:
            if layer.pending:
                self._check.begin(layer)

    def _taken(self, *state_dict: Any) -> None:
        pass

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self.current = self.current, None
        if current is None:
            return
        f = find_output(output)
        self.engine.finish(current, f)
        if f is None or not f.numel():
            return
        if f.ndim > 0:
            current.context.batch = self.order.samples(f)
        if self._probing:
            self._probed = current, f
            return
        values, number, version = f.detach(), f.output_nr, f._version
        hook = f.register_hook(lambda g: self._at_output(current, values, number, version, g))
        if f.grad_fn is not None:
            node, behind, *_ = origin(get_gradient_edge(f))
            if node is not f.grad_fn:
                node.register_prehook(lambda gs: self._behind_output(current, values, behind, gs))
        if self.fisher.noise.weights:  # before the last layer's own hook, which has to see what is handed on
            hooks: Any = f._backward_hooks
            for key in [key for key in hooks if key != hook.id]:
                hooks[key] = hooks.pop(key)

    def _at_output(self, current: Pass, f: Tensor, number: int, version: int, gradient: Tensor) -> Tensor | None:
        """Measure, and hand on the gradient that the likelihood's noise makes of it."""
        if self._busy or not self.collecting or not self._ties.measures(current.context) or not current.context.hears():
            return None
        self._output_gradient(current, f, number, version, gradient)
        return self.fisher.weighted(f, gradient) if self.collecting else None

    def _behind_output(
        self, current: Pass, f: Tensor, number: int, gradients: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        """At what the output is a cast of: that of a loss which the model has computed itself, without the cast."""
        gradient = gradients[number]
        if gradient is None:
            return None
        f = f.to(gradient.dtype)
        handed_on = self._at_output(current, f, number, f._version, gradient)
        return None if handed_on is None else (*gradients[:number], handed_on, *gradients[number + 1 :])

    def probe(self, model: nn.Module, x: Any) -> tuple[Tensor, Callable[[Tensor], Iterator[tuple[Layer, Statistics]]]]:
        """The output of a forward pass that is no training step's, and what gives the statistics of every use of a
        layer for a gradient at that output."""
        collecting, self.collecting, self._probing = self.collecting, True, True
        try:
            with torch.enable_grad():
                model(x)
        finally:
            self.collecting, self._probing = collecting, False
        if self._probed is None:
            raise TypeError("the model returned no tensor with a graph: is it the model that is trained?")
        (current, f), self._probed = self._probed, None
        place = origin(get_gradient_edge(f))

        def gradients(cotangent: Tensor) -> Iterator[tuple[Layer, Statistics]]:
            with torch.no_grad(), self._nested(f.device):
                for layer, x, e in self.engine.pairs(current, place, cotangent):
                    yield layer, self._deliver.statistics(layer, x, e, current.context)

        return f.detach(), gradients

    # The backward pass.

    def _output_gradient(self, current: Pass, f: Tensor, number: int, version: int, gradient: Tensor) -> None:
        self.engine.listen(current)
        if current.context.closed:
            self._ties.warn_repeated(current.context)
        if current.context.closed or not self.collecting:
            return  # the graph is walked again: its labels were drawn and its rows counted; or the step is abandoned
        # The node that runs this hook; holding it from the forward pass on would be a cycle through the graph.
        place = origin(GradientEdge(torch._C._current_autograd_node(), number))
        differentiable = torch.is_grad_enabled()  # backward(create_graph=True)
        with torch.no_grad(), self._nested(f.device):
            gradient = gradient.detach()
            current.context.held.clear()  # of a backward pass that raised
            self._check.begin_backward()
            intact = f._version == version
            reading = self.fisher.read(f, gradient, intact)
            if reading is None:
                self._unreadable = True
                return
            current.context.normaliser = reading.normaliser
            self.order.ask(self.layers, f, lambda cotangent: self.engine.pairs(current, place, cotangent))
            samples = self.order.samples(f)
            current.context.batch = samples if f.ndim else None
            before = 0 if self.processes is None else self.processes.rank * samples  # in the others' parts of the batch
            current.context.offset = before + (self.batch.samples if self.batch else 0)
            self._count(reading, samples)
            self._ties.measured(current.context)
            try:
                self._fisher_passes(current, place, f, gradient)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                self.fisher.fall_back(REENTRANT)
            for layer, x, e in current.context.waiting:
                self._deliver.true(layer, x, e, current.context)
            current.context.waiting.clear()
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()

        def ended() -> None:
            if self.collecting:
                self._deliver.held(current.context)
            current.close(keep_graph, self._ties.epoch, differentiable)
            self._ties.ended()

        torch.autograd.Variable._execution_engine.queue_callback(ended)

    def _fisher_passes(self, current: Pass, place: GradientEdge, f: Tensor, gradient: Tensor) -> None:
        """The nested passes with gradients that make the Fisher."""
        plain = [layer for layer in self.layers if layer.plain and layer.active and layer.owner.requires_grad]
        exact = self.config.fisher == "exact"
        for draw, cotangent in enumerate(self.fisher.cotangents(f, gradient)):
            found: dict[Layer, list[Pair]] = {}
            for pair in self.engine.pairs(current, place, cotangent, () if exact else plain):
                if pair[0].trained:
                    found.setdefault(pair[0], []).append(pair)
            for layer, pairs in found.items():
                self._deliver(layer, pairs, current.context, draw)
        if plain and exact and not self.fisher.empirical:
            # Columns of a root are not independent from sample to sample: their sum says nothing, that of draws does.
            for pair in self.engine.pairs(current, place, self.fisher.sample(f, gradient), plain):
                if pair[0].plain:
                    self._deliver(pair[0], [pair], current.context)

    def wants_true_gradient(self, layer: Layer) -> bool:
        return self.fisher.empirical or not self.fisher.decided or layer.pending

    def receive_true_gradient(self, layer: Layer, x: Tensor, e: Tensor, context: Context) -> None:
        """Called by the engine with the pairs of the user's own backward pass."""
        if self._busy or not self.collecting or not (layer.active and layer.trained and self._ties.measures(context)):
            return
        if not e.numel():  # an empty batch, or an expert that nothing was sent to
            self._check.idle(layer)
            return
        with torch.no_grad(), full_precision(e.device):
            e = e.detach()
            if layer.pending:
                statistics = self._deliver.readable(layer, x, e, context)
                if statistics is None:
                    return
                self._check.add(layer, x, e, statistics)
            if context.normaliser is None:
                context.waiting.append((layer, x, e))
            else:
                self._deliver.true(layer, x, e, context)

    @contextmanager
    def _nested(self, device: torch.device) -> Iterator[None]:
        self._busy = True
        try:
            with full_precision(device):
                yield
        finally:
            self._busy = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward and backward passes inside are not captured."""
        collecting, self.collecting = self.collecting, False
        try:
            with self.engine.quiet():
                yield
        finally:
            self.collecting = collecting

    def _count(self, reading: Reading, samples: int) -> None:
        one = Batch(reading.predictions, reading.normaliser, reading.misfit, samples)
        self.batch = one if self.batch is None else self.batch.joined(one)

    # Several processes.

    @property
    def processes(self) -> Processes | None:
        """Those that train the model together, where they are several; known once a forward pass was seen."""
        return self.fisher.processes

    def report(self, device: torch.device) -> Tensor:
        """What this process has seen in the step, in numbers."""
        batch, none = self.batch, torch.zeros((), device=device)
        seen = (none, none, none) if batch is None else (batch.predictions, batch.normaliser, batch.misfit)
        samples = 0 if batch is None else batch.samples
        orders = (ORDERS.index(layer.order) for layer in self.layers)
        numbers = [samples, self.order.axis, *(STATUS.index(layer.status) for layer in self.layers), *orders]
        parts = torch.stack([number.double() for number in seen]), self.fisher.report(device), torch.tensor(numbers)
        return torch.cat([part.to(device, torch.float64) for part in parts])

    def agree(self, processes: Processes, rows: Tensor) -> None:
        """Go on from everybody's reports, (processes, n), as from those of one process.

        p.grad is the mean of the processes' gradients, so that the gradient of the summed loss is the sum of their N
        times that: where a process has seen nothing, its N is taken to be that of the others.
        """
        predictions, normaliser, misfit = rows[:, :3].unbind(1)
        self.fisher.agree(processes, rows[:, 3:6])
        samples, axes, *others = rows[:, 6:].T.tolist()
        self.order.axis = int(max(axes))
        if any(samples):
            N = normaliser.sum() * processes.size / (normaliser > 0).sum().clamp(min=1)
            self.batch = Batch(predictions.sum(), N, misfit.amax(), int(sum(samples)))
        failed = []
        count = len(self.layers)
        for layer, theirs, orders in zip(self.layers, others[:count], others[count:], strict=True):
            layer.order = ORDERS[int(max(orders))]
            worst = STATUS[int(max(theirs))]
            if worst == "failed" != layer.status:
                layer.reason = "its capture failed in another process"
                failed.append(layer)
            layer.status = worst
        warn(failed)

    # What is measured belongs to the gradients that came with it.

    def drop(self) -> None:
        """What was measured for this step is not to count: the gradients that it belongs to are gone."""
        self._dropped()
        self.forget()

    @contextmanager
    def around_passes(self, scale: Tensor | None, taken: bool = True) -> Iterator[None]:
        """Around the passes of a step.

        Args:
            scale: what their loss is multiplied by; None where it is not known to be.
            taken: whether gradients of before are taken away meanwhile, and given back.
        """
        self._ties.begin_passes(taken)
        self.fisher.scale = scale
        try:
            yield
        finally:
            self._ties.end_passes(self.batch is not None)
            self.fisher.scale = None

    # The self-check.

    def _note_gradient(self, p: nn.Parameter) -> None:
        if self.collecting and not self._busy and p.grad is not None:
            self._check.note(p, p.grad)

    def note_gradient(self, p: nn.Parameter, gradient: Tensor) -> None:
        """The gradient that the backward pass left, before anybody clips or rescales it."""
        self._check.note(p, gradient)

    def abandon_step(self) -> None:
        """Neither count nor compare what this step has seen, nor what is still to come in it."""
        self.collecting, self.batch = False, None
        self._check.end()

    @property
    def unread(self) -> bool:
        """Whether a model was called, and no gradient came to the output that is read."""
        return self.entered and self.batch is None and not self._unreadable

    def verify(self) -> list[Layer]:
        """Compare what was captured with what autograd accumulated; returns the layers that failed."""
        self._ties.warn_put_back()
        if self._unreadable:
            return []
        pending = [layer for layer in self.layers if layer.pending]
        if not pending:
            self._remove(self._check_handles)
        return self._check.judge(pending, self._deliver.layers, self.batch is not None, self.fisher.empirical)

    def forget(self) -> None:
        """Drop what backward passes have delivered for this step, not the forward passes that wait for theirs."""
        self.fisher.noise.forget()
        self.batch = None
        self._unreadable = False
        self._ties.forget()
        self._deliver.layers.clear()
        self._check.forget()

    def finish_step(self, collect_next: bool) -> None:
        """Forget this step's passes, and say whether the next one is measured."""
        self.engine.release()
        if self.engine.confused:
            self.engine.close()
            self.engine, self.engine_reason = HooksEngine(self), f"not BackPACK: {self.engine.confused}"
            if self.config.capture == "backpack":
                warnings.warn(f"GRNG captures by hooks, {self.engine_reason}", GRNGWarning, stacklevel=3)
        self.forget()
        self._check.end()
        self._ties.finish_step()
        self.collecting, self._busy = collect_next, False  # also where a pass was interrupted

    def close(self) -> None:
        """Remove every hook."""
        self._remove(self._handles)
        self._remove(self._check_handles)
        self.engine.close()
        self.current = None

    @staticmethod
    def _remove(handles: list[Any]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()
