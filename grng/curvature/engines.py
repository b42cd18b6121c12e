"""Who delivers a layer's input and output gradient: plain tensor hooks, or BackPACK. One interface.

Both see the same forward pass, record one `Use` per call of a layer, and answer `pairs(node, gradient)`: the pairs
(layer, input, output gradient) of a nested backward pass from the model's output with any gradient there. Where the
capture asks for it, they also deliver the pairs of the user's own backward pass as it runs.
"""

import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from grng.curvature.attention import Arrangement, arrangement, projections
from grng.curvature.layers import Layer
from grng.curvature.passes import origin
from grng.errors import invalid

if TYPE_CHECKING:
    from grng.curvature.capture import Capture
    from grng.curvature.passes import Pass

Pair = tuple[Layer, Tensor, Tensor]
FIRING = "Full backward hook is firing"  # torch's warning where a model's input needs no gradient


class Hook:
    """A bound method as a module hook that neither keeps its owner alive nor travels with a copy of the module.

    A model that is pickled or deep-copied while attached carries an inert hook instead, made of the standard library
    alone, so that it loads where GRNG is not installed.
    """

    def __init__(self, owner: Any, method: str, *extra: Any) -> None:
        self.owner, self.method, self.extra = weakref.ref(owner), method, extra

    def __call__(self, *args: Any) -> None:
        owner = self.owner()
        if owner is not None:
            getattr(owner, self.method)(*self.extra, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # accepts any arguments and returns None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nullcontext().__exit__


class Use(NamedTuple):
    """One call of a layer: its input and the place of its output in the graph; of a projection of attention, the
    arrangement of what is found at that place in place of the input."""

    layer: Layer
    x: Tensor | Arrangement
    edge: GradientEdge

    def pair(self, place: GradientEdge, e: Tensor) -> Pair:
        if isinstance(self.x, Tensor):
            return self.layer, self.x, e
        return self.layer, self.x.input(place.node), self.x.gradient(e)


class HooksEngine:
    """A forward hook that notes the output's place in the graph.

    The place, not the tensor: an in-place operation on the output changes what the tensor stands for, not its place.
    """

    name = "hooks"
    confused = ""  # why this engine must be given up, once it is known

    def __init__(self, capture: "Capture") -> None:
        self.capture = capture
        # First among the module's hooks: before the capture reads a model that is itself a layer, and before anybody
        # else's hook replaces the output.
        self.handles = [
            layer.module.register_forward_hook(Hook(self, "_note", layer), prepend=True, with_kwargs=True)
            for layer in capture.layers
            if not layer.plain and layer.host is None
        ]
        hosts: dict[nn.Module, list[Layer]] = {}
        for layer in capture.layers:
            if layer.host is not None:
                hosts.setdefault(layer.host, []).append(layer)
        self.handles += [
            host.register_forward_hook(Hook(self, "_note_projections", layers), prepend=True, with_kwargs=True)
            for host, layers in hosts.items()
        ]

    def _note(self, layer: Layer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current = self.capture.current
        if current is None or not layer.active or not isinstance(output, Tensor) or not output.requires_grad:
            return
        x = layer.geometry.input(args, kwargs).detach()
        current.record(Use(layer, x, get_gradient_edge(output)))
        if self.capture.wants_true_gradient(layer):
            # The closure holds no place in the graph, which would be a cycle and keep the graph alive.
            context, deliver = current.context, self.capture.receive_true_gradient
            output.register_hook(lambda e: deliver(layer, x, e, context))

    def _note_projections(self, layers: list[Layer], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current, output = self.capture.current, output[0] if isinstance(output, tuple) else output
        if current is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        active = [layer for layer in layers if layer.active]
        for found in projections(active, inputs, output):
            use = Use(found.layer, arrangement(found, inputs[0]), GradientEdge(found.node, 0))
            current.record(use)
            if self.capture.wants_true_gradient(found.layer):
                self._listen_at(found.node, use._replace(edge=None), current.context)  # type: ignore[arg-type]

    def _listen_at(self, node: Any, use: Use, context: Any) -> None:
        """Deliver what the user's own backward pass brings to a node; nothing of it holds the node."""
        deliver = self.capture.receive_true_gradient

        def arrived(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                place = GradientEdge(torch._C._current_autograd_node(), 0)
                deliver(*use.pair(place, gradients[0]), context)

        node.register_prehook(arrived)

    def begin(self) -> None:
        """Nothing to prepare for a forward pass."""

    def finish(self, current: "Pass", output: Tensor | None) -> None:
        """Keep no place that leads back to the output, whose hook holds the uses: that would be a cycle through the
        graph. The last layer's place is the output's own, which the hook finds by itself; what was made of the output
        later is not reached from it.
        """
        if output is None or output.grad_fn is None:
            return
        node, number, *_ = origin(get_gradient_edge(output))
        made = node._sequence_nr()
        places = [origin(use.edge) for use in current.uses]
        current.uses = [
            use._replace(edge=GradientEdge(None, number))  # type: ignore[arg-type]
            if place.node is node and place.output_nr == number
            else use
            for use, place in zip(current.uses, places, strict=True)
            if place.node._sequence_nr() <= made
        ]

    def pairs(
        self, current: "Pass", place: GradientEdge, gradient: Tensor, plain: Sequence[Layer] = ()
    ) -> Iterator[Pair]:
        """Of a nested pass from the output; of `plain` layers the parameter's own gradient, in both places."""
        edges = [place if use.edge.node is None else use.edge for use in current.uses]
        inputs: list[Any] = [*edges, *(layer.owner for layer in plain)]
        if not inputs:
            return
        with _apart():
            found = torch.autograd.grad([place], inputs, [gradient], retain_graph=True, allow_unused=True)
        for use, edge, e in zip(current.uses, edges, found[: len(edges)], strict=True):
            if e is not None and use.layer.active:
                yield use.pair(edge, e)
        yield from alone(plain, found[len(edges) :])

    def listen(self, current: "Pass") -> None:
        """Tensor hooks listen anyway."""

    def quiet(self) -> AbstractContextManager[None]:
        """What surrounds passes that are not captured."""
        return nullcontext()

    def release(self) -> None:
        """Nothing stays on the modules between steps."""

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def alone(plain: Sequence[Layer], gradients: Sequence[Tensor | None]) -> Iterator[Pair]:
    """Pairs of plain layers."""
    for layer, gradient in zip(plain, gradients, strict=True):
        if gradient is not None:
            yield layer, gradient, gradient


@contextmanager
def _apart() -> Iterator[None]:
    """A nested pass that BackPACK, where the user has extended the model, does not take for the user's own."""
    backpack = sys.modules.get("backpack")
    with warnings.catch_warnings(), nullcontext() if backpack is None else backpack.backpack(retain_graph=True):
        warnings.filterwarnings("ignore", message=FIRING)
        yield


def make_engine(name: str, capture: "Capture", model: nn.Module, twice: bool) -> tuple["HooksEngine", str]:
    """The engine that was asked for, or for "auto" BackPACK where the module tree shows that it is safe.

    Returns:
        the engine and, in words, why it was chosen.
    """
    if name == "hooks":
        return HooksEngine(capture), "asked for"
    from grng.curvature import backpack

    if name == "backpack":
        if twice:
            raise invalid("capture", name, '"hooks" or "auto" where step() takes a second pass')
        return backpack.BackpackEngine(capture, model), "asked for"
    obstacle = "step() takes a second pass" if twice else backpack.obstacle(model, capture.layers)
    if obstacle is None:
        return backpack.BackpackEngine(capture, model), "every module is one that BackPACK carries"
    return HooksEngine(capture), f"not BackPACK: {obstacle}"
