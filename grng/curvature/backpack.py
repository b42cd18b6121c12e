"""Capture by BackPACK: our own first-order extension on the leaf modules, active on statistics passes only.

BackPACK keeps its state in class attributes and its inputs and outputs on the modules. So the modules are extended for
the length of a forward pass only, and restored handle by handle: the graph keeps the hooks that it was built with. The
extension is switched on from the output's hook until the backward pass ends.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from grng.curvature.engines import FIRING, HooksEngine, Pair, alone
from grng.curvature.layers import Layer

if TYPE_CHECKING:
    from grng.curvature.capture import Capture
    from grng.curvature.passes import Pass

_INSTALL = (
    "capture='backpack' needs BackPACK: pip install --no-deps backpack-for-pytorch unfoldNd && pip install einops "
    "(without --no-deps it drags in torchvision, which it does not need); or use capture='hooks'"
)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_SAFE = (
    *(nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.LogSoftmax),
    *(nn.Flatten, nn.Identity, nn.Dropout, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)


def obstacle(model: nn.Module, layers: list[Layer]) -> str | None:
    """Why BackPACK is not safe on this model, or None where it is."""
    try:
        import backpack  # noqa: F401
    except ImportError:
        return "it is not installed"
    if type(model) in _LAYERS:
        return "the model is itself a layer, whose hooks would come too late"
    seen: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        where = f"{name or 'the model'} is a {kind.__name__}"
        if kind is nn.Sequential:
            continue
        if kind not in _LAYERS and kind not in _SAFE:
            return f"{where}, not a chain of known layers"
        if getattr(module, "inplace", False):
            return f"{where} that works in place"
        if getattr(module, "_backpack_extend", False):
            return f"{name or 'the model'} was extended by somebody else"
        if module._forward_hooks and kind in _LAYERS:
            return f"{where} with a forward hook, which may replace its output"
        if id(module) in seen:
            return f"{name} is used more than once"
        seen.add(id(module))
    for layer in layers:
        if not layer.plain and layer.weight is None:
            return f"{layer.name} has a frozen weight"
    return None


class BackpackEngine(HooksEngine):
    """The same uses, delivered by BackPACK's module hooks."""

    name = "backpack"

    def __init__(self, capture: "Capture", model: nn.Module) -> None:
        try:
            import backpack
            from backpack.context import CTX
            from backpack.extensions.firstorder.base import FirstOrderBackpropExtension, FirstOrderModuleExtension
        except ImportError as error:
            raise ImportError(_INSTALL) from error
        self._backpack, self._context = backpack, CTX
        self.capture = capture
        self.handles: list[Any] = []
        self._by_module = {layer.module: layer for layer in capture.layers if not layer.plain and layer.host is None}
        self._parameters = list(model.parameters())
        self._extended: list[nn.Module] = []
        self._found: list[Pair] | None = None
        self._switch = ExitStack()
        self._current: Pass | None = None  # whose backward pass is running
        engine = self

        class Deliver(FirstOrderModuleExtension):
            def __call__(self, extension: Any, module: nn.Module, g_inp: Any, g_out: Any) -> None:
                engine._receive(module, g_out[0])

        kinds = {type(module) for module in self._by_module}
        self._extension = FirstOrderBackpropExtension("grng", {kind: Deliver() for kind in kinds}, fail_mode="SILENT")

    def begin(self) -> None:
        """Extend the layers; the handles that BackPACK registers become this engine's own."""
        self._restore()  # after a forward pass that was interrupted
        known = len(self._context.hook_handles)
        self._extended = [m for m in self._by_module if not getattr(m, "_backpack_extend", False)]
        for module in self._extended:
            self._backpack.extend(module)
        self.handles = self._context.hook_handles[known:]
        del self._context.hook_handles[known:]

    def finish(self, current: "Pass", output: Tensor | None) -> None:
        """Take the inputs over: on the modules they would be overwritten by the next forward pass."""
        error = sys.exception()
        if error is not None and "modified inplace" in str(error):
            error.add_note(
                "GRNG captures by BackPACK, which was asked for and takes no in-place operations on a layer's output: "
                "use Curvature(capture='auto') or 'hooks'"
            )
        for module in self._by_module:
            x = getattr(module, "input0", None)
            if isinstance(x, Tensor):
                current.inputs[module] = x.detach()
        self._restore()

    def _restore(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for module in self._extended:
            self._backpack.memory_cleanup(module)
            del module._backpack_extend  # left behind, it would make the next extend() a silent no-op
        self._extended = []

    def _receive(self, module: nn.Module, e: Tensor | None) -> None:
        layer, current = self._by_module.get(module), self._current
        if layer is None or not layer.active or e is None or current is None or module not in current.inputs:
            return
        x = current.inputs[module]
        if e.ndim and x.shape[:1] != e.shape[:1]:
            self._give_up("a backward pass brought gradients of another forward pass, as derivatives in the loss do")
            return
        if self._found is not None:
            self._found.append((layer, x, e))
        elif self.capture.wants_true_gradient(layer):
            self.capture.receive_true_gradient(layer, x, e, current.context)

    def pairs(
        self, current: "Pass", place: GradientEdge, gradient: Tensor, plain: Sequence[Layer] = ()
    ) -> Iterator[Pair]:
        # BackPACK's module hooks run only where the pass goes through the module, down to its input: ask for the
        # gradients of all parameters, also of those below that somebody else trains, and of the model's inputs.
        weights = [*self._reached(), *current.given]
        before, self._current, self._found = self._current, current, []
        try:
            with self._active(self._extension, retain_graph=True):
                found = torch.autograd.grad([place], weights, [gradient], retain_graph=True, allow_unused=True)
            yield from self._found
            gradients = dict(zip(weights, found, strict=True))
            yield from alone(plain, [gradients.get(layer.owner) for layer in plain])
        finally:
            self._current, self._found = before, None

    def _reached(self) -> list[nn.Parameter]:
        """What a nested pass asks for: of a layer with a bias the bias, whose gradient costs a sum."""
        spared = {
            id(module.weight)
            for module in self._by_module
            if isinstance(getattr(module, "bias", None), nn.Parameter) and module.bias.requires_grad
        }
        return [p for p in self._parameters if p.requires_grad and id(p) not in spared]

    @contextmanager
    def _active(self, *extensions: Any, **settings: Any) -> Iterator[None]:
        with warnings.catch_warnings(), self._backpack.backpack(*extensions, **settings):
            warnings.filterwarnings("ignore", message=FIRING)
            yield

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """A product with a second derivative goes through the first pass's hooks again."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=FIRING)
            yield

    def listen(self, current: "Pass") -> None:
        """Called inside the user's backward pass: deliver its pairs too, until that pass ends."""
        if self._current is None:
            self._current, context = current, self._context
            self._switch.enter_context(
                self._active(  # beside what the user has switched on
                    *context.get_active_exts(),
                    self._extension,
                    extension_hook=context.get_extension_hook(),
                    retain_graph=context.get_retain_graph(),
                )
            )
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        elif self._current is not current and any(map(self.capture.wants_true_gradient, self.capture.layers)):
            self._give_up("two forward passes met in one backward pass, and its hooks do not tell which they see")

    def _give_up(self, reason: str) -> None:
        """Leave the layers to plain hooks from the next step on."""
        self.confused = reason
        self.capture.abandon_step()

    def _end(self) -> None:
        self._switch.close()
        self._current = None

    def release(self) -> None:
        self._end()

    def close(self) -> None:
        self._end()
        self._restore()
