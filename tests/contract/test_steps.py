"""What a step does and leaves alone, for every optimizer: directions, closures, hooks, gradients, scales, memory."""

import gc
import warnings
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from ..optimizer.cases import closure_of, mlp, stream
from .cases import (
    SCHEDULERS,
    Contract,
    Run,
    TestCase,
    batches,
    close,
    contracts,
    instantiate_device_type_tests,
)

Change = Callable[[Run], Any]


def one_pass(info: Contract) -> bool:
    return not info.step_requires_closure


def reads_grad(info: Contract) -> bool:
    """Not where the loss is differentiated twice: what a closure does to .grad is no part of that."""
    return "double" not in info.name


def gradients(run: Run) -> list[Tensor]:
    return [p.grad.detach().clone() for p in run.model.parameters() if p.grad is not None]


def stepped(run: Run, change: Change | None = None, at: int = 0) -> None:
    """A step on a batch, the gradients changed before it is made, wherever it takes them from."""
    inner = closure_of(run.optimizer, run.model, batches(at + 1)[at:])

    def closure() -> Tensor:
        loss = inner()
        if change:
            change(run)
        return loss

    if run.info.step_requires_closure:
        run.optimizer.step(closure)
    else:
        closure()
        run.optimizer.step()


def transposed(run: Run) -> None:
    """Weights, and with them their gradients, whose rows are not next to each other."""
    for p in run.model.parameters():
        if p.ndim == 2:
            p.data = p.data.mT.contiguous().mT
            assert not p.is_contiguous()


class TestSteps(TestCase):
    @contracts()
    def test_right_direction(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Down, and by the same steps however the weights lie in memory, here one column after the other."""
        ends = []
        for lie in (lambda run: None, transposed):
            run = Run(optim_info)
            lie(run)
            losses = run.steps(batches(1, B=5) * 6)
            assert losses[-1] < losses[0]
            ends.append(run.vector)
        if "SOAP" in optim_info.name:  # where its first gradient has no rank, its basis is whatever rounding makes it
            assert (ends[0] - ends[1]).norm() <= 3e-2 * ends[0].norm()
        else:
            assert close(ends[0], ends[1], 1e-9)

    @contracts()
    def test_schedulers(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """The settings that a scheduler leaves are those that the step goes by; lr is as it would be for torch's SGD;
        nothing warns of a wrong order."""
        for name in optim_info.schedulers:
            run, seen = Run(optim_info), []
            lr = run.optimizer.param_groups[0]["lr"]
            plain = torch.optim.SGD([torch.ones(1)], lr=lr, momentum=0.5)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                schedules = [SCHEDULERS[name](o) for o in (run.optimizer, plain)]
                for batch in batches(4):
                    seen.append(run.groups)
                    assert run.groups[0]["lr"] == plain.param_groups[0]["lr"]
                    run.steps([batch])
                    plain.step()
                    for schedule in schedules:
                        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            assert len({groups[0]["lr"] for groups in seen}) > 1
            by_hand = Run(optim_info)
            for batch, groups in zip(batches(4), seen, strict=True):
                for group, settings in zip(by_hand.optimizer.param_groups, groups, strict=True):
                    group.update(settings)
                by_hand.steps([batch])
            assert torch.equal(run.vector, by_hand.vector), name

    @contracts()
    def test_closure(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """It is called first, at the weights as they were, with gradients on also under no_grad; what it returned the
        first time comes back."""
        run = Run(optim_info)
        inner, start, seen = closure_of(run.optimizer, run.model, batches(1)), run.vector, []

        def closure() -> Tensor:
            seen.append((run.vector, torch.is_grad_enabled(), inner()))
            return seen[-1][2]

        with torch.no_grad():
            found = run.optimizer.step(closure)
            assert not torch.is_grad_enabled()
        assert found is seen[0][2] or torch.equal(found, seen[0][2])
        assert torch.equal(seen[0][0], start)
        assert all(enabled for _, enabled, _ in seen)
        assert len(seen) == 1 or optim_info.step_requires_closure

    @contracts(where=one_pass)
    def test_closure_is_the_plain_step(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        plain, closed = Run(optim_info), Run(optim_info)
        for batch in batches(3):
            plain.steps([batch])
            closed.optimizer.step(closure_of(closed.optimizer, closed.model, [batch]))
        assert torch.equal(plain.vector, closed.vector)

    @contracts()
    def test_step_hooks(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Global before, own before, the step, own after, global after; each once, and one entry in the profile; a
        hook before the step may change the arguments."""
        run, events = Run(optim_info), []
        run.steps(batches(1))
        optimizer = run.optimizer
        inner = closure_of(optimizer, run.model, batches(1))

        def give_closure(o: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            events.append("before")
            return (o, inner), {}

        optimizer.register_step_pre_hook(give_closure)
        optimizer.register_step_post_hook(lambda *_: events.append("after"))
        handles = [
            register_optimizer_step_pre_hook(lambda *_: events.append("global before")),
            register_optimizer_step_post_hook(lambda *_: events.append("global after")),
        ]
        try:
            with torch.autograd.profiler.profile(use_kineto=False) as seen:
                optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        assert events == ["global before", "before", "after", "global after"]
        names = [event.name for event in seen.function_events if event.name.startswith("Optimizer.step#")]
        assert names == [f"Optimizer.step#{type(optimizer).__name__}.step"]

    @contracts()
    def test_gradients_are_left_alone(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """.grad is the same tensor with the same values: the gradient at the weights before the step."""
        run, twin = Run(optim_info, weight_decay=0.1), Run(optim_info)
        for batch in batches(3):
            twin.model.load_state_dict(run.model.state_dict())
            twin.optimizer.zero_grad()
            closure_of(twin.optimizer, twin.model, [batch])()
            closure = closure_of(run.optimizer, run.model, [batch])
            if optim_info.step_requires_closure:
                run.optimizer.step(closure)
            else:
                closure()
                held = [p.grad for p in run.model.parameters()]
                run.optimizer.step()
                assert all(p.grad is g for p, g in zip(run.model.parameters(), held, strict=True))
            for mine, theirs in zip(gradients(run), gradients(twin), strict=True):
                assert close(mine, theirs)

    @contracts()
    def test_no_gradient_at_all(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """A step before any backward() moves nothing and counts for nothing; GRNG, which would be blind to a loop that
        trains another model, says so, and so does what needs a closure."""
        run, fresh = Run(optim_info), Run(optim_info)
        if optim_info.step_requires_closure or optim_info.name.startswith("GRNG"):
            with pytest.raises(RuntimeError, match=r"backward\(\)"):
                run.optimizer.step()
        else:
            assert run.optimizer.step() is None
        for each in (run, fresh):
            each.steps(batches(3))
        assert torch.equal(run.vector, fresh.vector)

    @contracts(where=reads_grad)
    def test_gradients_missing_for_some(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Where .grad is None there is no step and no decay; the parameter comes back later."""
        run = Run(optim_info, weight_decay=0.1)
        away = [run.model[0].weight, run.model[1].bias, run.model[3].bias]

        def drop(run: Run) -> None:
            for p in away:
                p.grad = None

        stepped(run)
        for i in (1, 2, 3):
            before = [p.detach().clone() for p in run.model.parameters()]
            stepped(run, drop if i < 3 else None, i)
            still = {id(p) for p, old in zip(run.model.parameters(), before, strict=True) if torch.equal(p, old)}
            assert still == ({id(p) for p in away} if i < 3 else set())
        assert run.vector.isfinite().all()

    @contracts(where=reads_grad)
    def test_gradients_of_zero(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Without decay a fresh optimizer leaves the weights where they are."""
        run = Run(optim_info, weight_decay=0.0)
        start = run.vector

        def zero(run: Run) -> None:
            for p in run.model.parameters():
                p.grad.zero_()

        for i in range(3):
            stepped(run, zero, i)
        assert torch.equal(run.vector, start)

    @contracts(where=lambda info: info.skips_nonfinite)
    def test_one_gradient_that_is_not_finite(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """The step is left out, with nothing of it in the state: what follows is what would have followed."""
        for bad in (float("nan"), float("inf")):
            run, clean = Run(optim_info), Run(optim_info)

            def spoil(run: Run, bad: float = bad) -> None:
                run.model[0].weight.grad[0, 0] = bad

            for each in (run, clean):
                stepped(each)
            before, state = run.vector, run.state
            stepped(run, spoil, 1)
            assert torch.equal(run.vector, before)
            for name, value in run.state.items():
                counts = ("grng_counts", "grng_steps", "regularizer_steps", "regularizer_skipped", "fisher_rng")
                assert torch.equal(value, state[name]) or name.split(".")[1].endswith(counts), name
            losses = run.steps(batches(1) * 6)
            assert losses[-1] < losses[0]
            assert all(value.isfinite().all() for value in run.state.values())

    @contracts(torch.float32, where=lambda info: info.name != "SophiaH")
    def test_grad_scaler(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """The scale cancels, overflow leaves out the step and halves the scale. Sophia-H takes no scaler: it needs its
        closure, which GradScaler.step() does not take."""
        plain, run = Run(optim_info, dtype), Run(optim_info, dtype)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i, (x, y) in enumerate(batches(4, dtype)):
            overflow = i == 2
            before = run.vector
            if not overflow:
                plain.steps([(x, y)])
            run.optimizer.zero_grad()
            passes = run.optimizer.passes(scaler) if optim_info.step_requires_closure else [torch.enable_grad()]
            for each in passes:
                with each:
                    loss = cross_entropy(run.model(x), y)
                    (scaler.scale(loss) * (float("inf") if overflow else 1.0)).backward()
            scaler.step(run.optimizer)
            scaler.update()
            if i >= 2:  # SOAP's first step only looks
                assert torch.equal(run.vector, before) == overflow
            assert scaler.get_scale() == (512.0 if i >= 2 else 1024.0)
            if i < 2:
                assert torch.allclose(run.vector, plain.vector, rtol=2e-4, atol=1e-5)

    @contracts(where=lambda info: info.supports_param_groups)
    def test_for_loop(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """A group for every parameter, which leaves nothing to be done for several at once, makes the same steps."""
        together = Run(optim_info)
        alone = Run(optim_info, params=lambda model: [{"params": [p]} for p in model.parameters()])
        for run in (together, alone):
            run.steps(batches(5))
        assert close(together.vector, alone.vector)

    @contracts(where=lambda info: "foreach" in info.older)
    def test_foreach(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """torch's two ways, under regularizers as bare."""
        runs = [Run(optim_info, foreach=foreach) for foreach in (False, True)]
        for run in runs:
            run.steps(batches(5))
        assert close(runs[0].vector, runs[1].vector)

    @contracts()
    def test_memory_is_flat(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """As many tensors live after 24 steps as after 12, also without the garbage collector."""
        run, counts = Run(optim_info), []
        run.steps(batches(1))
        gc.disable()
        gc.freeze()  # what was there before is not looked at
        try:
            for _ in range(2):
                run.steps(batches(3) * 4)
                counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
        finally:
            gc.unfreeze()
            gc.enable()
        assert counts[1] <= counts[0]

    @contracts(torch.float32)
    def test_peak_memory(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """A step takes no more at once, beside what stays, than a few times the parameters and the state: in particular
        no matrix of parameters by parameters, which would be a thousand times as much."""
        run = Run(optim_info, dtype, build=partial(mlp, 48, 48, 48, 48))
        found = stream(1, n_in=48, C=48, dtype=dtype)
        run.steps(found * 4)
        kept = run.vector.nbytes + sum(value.nbytes for value in run.state.values())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run.steps(found)
        changes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        levels = list(accumulate(changes))  # above the lowest so far: what was left from before may be freed meanwhile
        peak = max(level - low for level, low in zip(levels, accumulate(levels, min), strict=True))
        # The filter holds the columns of V, of which there are a few times sixteen.
        assert 0 < peak < (40 if "kalman" in optim_info.name else 4) * kept


instantiate_device_type_tests(TestSteps, globals(), only_for="cpu")
