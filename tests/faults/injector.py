"""A training run into which faults are injected, one a step; what can go wrong, and what must become of it."""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from grng import GRNG, Curvature
from grng.regularizers import Transform

from ..optimizer.cases import Batch, Loss, Method, Transformer, cnn, mixed, mlp

NAN, INF = float("nan"), float("inf")
# Of a step that raises: what its forward and backward passes draw and read stays drawn and read.
OF_THE_PASSES = ("fisher_rng", "loss_scale", "likelihood", "layer_status")
ERRORS: tuple[type[BaseException], ...] = (RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt, ZeroDivisionError)


@dataclass(frozen=True)
class Task:
    """A model, its loss and its batches."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]
    loss: Loss = cross_entropy
    inside: str = "0"  # a submodule whose output is hidden
    real: bool = True  # whether its inputs are real numbers


TASKS = {
    "mixed": Task(
        mixed, lambda B, g: (torch.randn(B, 4, generator=g).double(), torch.randint(3, (B,), generator=g)), inside="1"
    ),
    "cnn": Task(
        lambda: cnn(), lambda B, g: (torch.randn(B, 1, 5, 5, generator=g), torch.randint(3, (B,), generator=g))
    ),
    "transformer": Task(
        Transformer,
        lambda B, g: (torch.randint(7, (B, 6), generator=g), torch.randint(7, (B,), generator=g)),
        inside="qkv",
        real=False,
    ),
    "regression": Task(
        lambda: mlp(3, 4, 2, dtype=torch.float32),
        lambda B, g: (torch.randn(B, 3, generator=g), torch.randn(B, 2, generator=g)),
        mse_loss,
    ),
}


@dataclass(frozen=True)
class Armed(Transform):
    """Leaves gradients alone, or raises."""

    errors: list[BaseException] = field(default_factory=list)

    def transform(self, parameters: Any, gradients: list[Tensor], t: int) -> list[Tensor]:
        if self.errors:
            raise self.errors.pop()
        return gradients


class Run:
    """A model under an optimizer, of which every single step can be made to fail."""

    def __init__(self, method: Method, task: Task, seed: int) -> None:
        self.method, self.task, self.random = method, task, random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.armed = Armed()
        self.model = task.build()
        every, burn_in = self.random.choice([(1, 0), (2, 0), (2, 3)])
        curvature = Curvature(stats_every=every, inverse_every=1, burn_in=burn_in)
        self.optimizer: GRNG = method(self.model, regularizer=[self.armed], curvature=curvature)
        self.fired: Counter[str] = Counter()
        self.lines = 0

    def batch(self, B: int = 6) -> Batch:
        return self.task.batch(B, self.numbers)

    def step(
        self,
        batch: Batch | None = None,
        *,
        after: Callable[[], Any] = lambda: None,
        loss_of: Callable[[Tensor], Tensor] = lambda loss: loss,
        around: AbstractContextManager[Any] | None = None,
    ) -> float:
        """One step of the loop; `after` runs between backward() and step(), which runs inside of `around`."""
        x, y = self.batch() if batch is None else batch

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.task.loss(self.model(x), y))
            loss.backward()
            after()
            return loss.detach()

        if self.optimizer.requires_closure:
            with around or nullcontext():
                return float(self.optimizer.step(closure))
        loss = closure()
        with around or nullcontext():
            self.optimizer.step()
        return float(loss)

    def error(self) -> BaseException:
        return self.random.choice(ERRORS)("injected")

    def parameter(self) -> nn.Parameter:
        return self.random.choice([p for p in self.model.parameters() if p.grad is not None])

    def state(self) -> dict[str, Tensor]:
        """Copies of all parameters and of the whole state."""
        found = {f"parameter {name}": p for name, p in self.model.named_parameters()}
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{i} {name}": value for name, value in state.items() if name not in OF_THE_PASSES}
        return {name: value.detach().clone() for name, value in found.items()}


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    mine = name in vars(owner)
    known = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if mine:
            setattr(owner, name, known)
        else:
            delattr(owner, name)


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


# Faults. Each makes one step.


def spoil(tensor: Tensor, value: float, at: random.Random) -> None:
    """Put a value somewhere into a tensor."""
    if tensor.numel():
        tensor.detach().view(-1)[at.randrange(tensor.numel())] = value


def gradient(value: float) -> Callable[[Run], Any]:
    def fault(run: Run) -> None:
        run.step(after=lambda: spoil(run.parameter().grad, value, run.random))  # type: ignore[arg-type]

    return fault


def sanitised(run: Run) -> None:
    """A batch with NaN in it, whose gradients the user repairs: what was measured of it is not repaired."""

    def repair() -> None:
        for p in run.model.parameters():
            if p.grad is not None:
                p.grad = p.grad.nan_to_num(0, 0, 0)

    with activation_of(run, NAN):
        run.step(after=repair)


@contextmanager
def activation_of(run: Run, value: float) -> Iterator[None]:
    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        spoil(output, value, run.random)
        return output

    with hooked(run.model.get_submodule(run.task.inside).register_forward_hook(replace)):
        yield


def activation(value: float) -> Callable[[Run], Any]:
    def fault(run: Run) -> None:
        with activation_of(run, value):
            run.step()

    return fault


def inputs(value: float) -> Callable[[Run], Any]:
    def fault(run: Run) -> None:
        x, y = run.batch()
        spoil(x, value, run.random)
        run.step((x, y))

    return fault


def zero_gradients(run: Run) -> None:
    run.step(loss_of=lambda loss: loss * 0)


def batch_of(B: int) -> Callable[[Run], Any]:
    return lambda run: run.step(run.batch(B))


NUMBERS = ("p0", "seen", "lam")  # of what is saved
SQUARES = ("second", "fisher")  # element by element: any positive numbers are possible
KRONECKER = ("P_in", "P_out")  # repaired in hundreds of steps where they are indefinite, "broken" until then
DERIVED = ("l", "U_l", "gamma", "U_g", "X_l", "X_g")  # from factors


def factors(change: Callable[[Tensor, random.Random], None], *spared: str) -> Callable[[Run], Any]:
    """Of some of the matrices of every factor, basis, inverse and covariance, but for those that are spared."""

    def fault(run: Run) -> None:
        for name, stacked in run.optimizer._preconditioner.saved.items():
            if name not in (*NUMBERS, *spared):
                for stack in stacked.stacks:
                    for matrix in stack:
                        if matrix.numel() and run.random.random() < 0.5:
                            change(matrix, run.random)
        run.step()

    return fault


def rank_one(matrix: Tensor, at: random.Random) -> None:
    v = torch.randn(matrix.shape[-1], dtype=matrix.dtype)
    matrix.copy_(v * v if matrix.ndim == 1 or matrix.shape[0] != matrix.shape[1] else v.outer(v))


def indefinite(matrix: Tensor, at: random.Random) -> None:
    if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]:
        matrix.copy_(matrix + matrix.mT - matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype))
    else:
        matrix.neg_()


def failing(name: str, change: Callable[..., Any]) -> Callable[[Run], Any]:
    """A function of torch.linalg, of which every call in the step does not do what it should."""

    def fault(run: Run) -> None:
        known = getattr(torch.linalg, name)

        def instead(*args: Any, **kwargs: Any) -> Any:
            run.fired["calls of " + name] += 1
            return change(known, *args, **kwargs)

        calls = run.fired["calls of " + name]
        with patched(torch.linalg, name, instead):
            try:
                run.step()
            finally:
                assert run.fired["calls of " + name] > calls

    return fault


def no_factor(cholesky_ex: Any, A: Tensor, **settings: Any) -> Any:
    root, info = cholesky_ex(A, **settings)
    return torch.return_types.linalg_cholesky_ex((root * 1e3, info + 1))


def no_convergence(eigh: Any, A: Tensor) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


def nan_of(eigh: Any, A: Tensor) -> Any:
    w, U = eigh(A)
    return torch.return_types.linalg_eigh((torch.full_like(w, NAN), torch.full_like(U, NAN)))


def out_of_memory(eigh: Any, A: Tensor) -> Any:
    raise torch.OutOfMemoryError("injected")


def raising(error: BaseException) -> Callable[..., Any]:
    def instead(*args: Any, **kwargs: Any) -> Any:
        raise error

    return instead


def closure_before(run: Run) -> None:
    run.optimizer.step(raising(run.error()))


def closure_after(run: Run) -> None:
    def closure() -> Tensor:
        x, y = run.batch()
        run.optimizer.zero_grad()
        run.task.loss(run.model(x), y).backward()
        raise run.error()

    run.optimizer.step(closure)


def forward_hook(run: Run) -> None:
    module = run.random.choice([module for module in run.model.modules() if not list(module.children())])
    with hooked(module.register_forward_hook(raising(run.error()))):
        run.step()


def tensor_hook(run: Run) -> None:
    error, inside = run.error(), run.model.get_submodule(run.task.inside)

    def listen(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(raising(error))

    with hooked(inside.register_forward_hook(listen)):
        run.step()


def parameter_hook(run: Run) -> None:
    with hooked(next(run.model.parameters()).register_hook(raising(run.error()))):
        run.step()


def method_of_the_preconditioner(*names: str) -> Callable[[Run], Any]:
    """Whichever of them the step calls has done its work, on the state too, when it raises."""

    def fault(run: Run) -> None:
        method, error = run.optimizer._preconditioner, run.error()

        def failing_after(known: Callable[..., Any]) -> Callable[..., Any]:
            def instead(*args: Any) -> Any:
                known(*args)
                raise error

            return instead

        with ExitStack() as stack:
            for name in names:
                stack.enter_context(patched(method, name, failing_after(getattr(method, name))))
            run.step()

    return fault


def regularizer(run: Run) -> None:
    run.armed.errors.append(run.error())
    run.step()


def step_hook(register: str) -> Callable[[Run], Any]:
    def fault(run: Run) -> None:
        with hooked(getattr(run.optimizer, register)(raising(run.error()))):
            run.step()

    return fault


@contextmanager
def each_line(optimizer: GRNG, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` before every line of the package that runs between a step's gradients and its last arithmetic."""

    def local(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            act()
        return local

    def enter(frame: Any, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        return local if "/grng/" in name or "/kernels/" in name else None

    known = optimizer._directions

    def directions(*args: Any) -> Any:
        before = sys.gettrace()
        sys.settrace(enter)
        try:
            return known(*args)
        finally:
            sys.settrace(before)

    with patched(optimizer, "_directions", directions):
        yield


def interrupted(run: Run) -> None:
    """Before any line, as a KeyboardInterrupt comes; or where memory runs out."""
    left, error = run.random.randint(1, max(run.lines, 1)), run.error()

    def act() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise error

    run.step(around=each_line(run.optimizer, act))
    raise LookupError("the step was over before")


@dataclass(frozen=True)
class Fault:
    """`inject` makes one step. What must become of it: "skipped": no parameter moves; "made": no error; "raised": what
    was injected comes out, and the step is not made; "raised after": it is made; "interrupted": it is made or not.
    `measuring`: it has to be a step that measures."""

    inject: Callable[[Run], Any]
    outcome: str
    applies: Callable[[Method, Task], bool] = lambda method, task: True
    measuring: bool = False


def kfac_like(*names: str) -> Callable[[Method, Task], bool]:
    return lambda method, task: method.name in names


EIGEN = kfac_like("ring", "kfac", "ekfac", "reng-double", "reng-finite", "reng-ggn", "kalman-kron-exact")
CHOLESKY = kfac_like("ring-factored", "kalman-vd", "kalman-fd", "kalman-sample", "kalman-kron", "kalman-kron-exact")
REAL = lambda method, task: task.real  # noqa: E731
FORGETS = lambda method, task: method.name != "kalman-sample"  # noqa: E731  # whose fading penalty is a sum
HUGE = lambda method, task: task.real and FORGETS(method, task)  # noqa: E731
# reng-ggn multiplies by a factor as well, and its momentum remembers it.
BOUNDED = lambda method, task: method.name not in ("ring-identity", "reng-ggn")  # noqa: E731
FACTORS = lambda method, task: method.name != "ring-identity"  # noqa: E731

FAULTS = {
    "gradient NaN": Fault(gradient(NAN), "skipped"),
    "gradient inf": Fault(gradient(INF), "skipped"),
    "gradient -inf": Fault(gradient(-INF), "skipped"),
    "gradients zero": Fault(zero_gradients, "made"),
    "activation NaN": Fault(activation(NAN), "skipped"),
    "activation inf": Fault(activation(INF), "made", FORGETS),
    "activation huge": Fault(activation(1e30), "made", FORGETS),
    "activation NaN, gradients repaired": Fault(sanitised, "made"),
    "input NaN": Fault(inputs(NAN), "skipped", REAL),
    "input inf": Fault(inputs(INF), "made", HUGE),
    "input huge": Fault(inputs(-1e30), "made", HUGE),
    "batch of 0": Fault(batch_of(0), "made"),
    "batch of 2": Fault(batch_of(2), "made"),
    "batch of 13": Fault(batch_of(13), "made"),
    "factors NaN": Fault(factors(lambda m, at: spoil(m, NAN, at)), "made", FACTORS),
    "factors inf": Fault(factors(lambda m, at: spoil(m, INF, at)), "made", FACTORS),
    "factors all NaN": Fault(factors(lambda m, at: m.fill_(NAN)), "made", FACTORS),  # type: ignore[arg-type,return-value]
    "factors huge": Fault(factors(lambda m, at: m.mul_(1e12), *DERIVED), "made", BOUNDED),  # type: ignore[arg-type,return-value]
    "factors of rank one": Fault(factors(rank_one, *DERIVED, *SQUARES), "made", FACTORS),
    "factors indefinite": Fault(factors(indefinite, *DERIVED, *SQUARES, *KRONECKER), "made", FACTORS),
    "cholesky fails": Fault(failing("cholesky_ex", no_factor), "made", CHOLESKY, True),
    "eigh raises": Fault(failing("eigh", no_convergence), "made", EIGEN, True),
    "eigh gives NaN": Fault(failing("eigh", nan_of), "made", EIGEN, True),
    "eigh out of memory": Fault(failing("eigh", out_of_memory), "raised", EIGEN, True),
    "closure raises at once": Fault(closure_before, "raised"),
    "closure raises at its end": Fault(closure_after, "raised"),
    "forward hook raises": Fault(forward_hook, "raised"),
    "tensor hook raises": Fault(tensor_hook, "raised"),
    "parameter hook raises": Fault(parameter_hook, "raised"),
    "observe raises": Fault(method_of_the_preconditioner("observe"), "raised", measuring=True),
    "refresh raises": Fault(method_of_the_preconditioner("refresh"), "raised", measuring=True),
    "precondition raises": Fault(method_of_the_preconditioner("precondition", "precondition_penalised"), "raised"),
    "regularizer raises": Fault(regularizer, "raised"),
    "step pre-hook raises": Fault(step_hook("register_step_pre_hook"), "raised"),
    "step post-hook raises": Fault(step_hook("register_step_post_hook"), "raised after"),
    "interrupted 1": Fault(interrupted, "interrupted"),
    "interrupted 2": Fault(interrupted, "interrupted"),
    "interrupted 3": Fault(interrupted, "interrupted"),
}
