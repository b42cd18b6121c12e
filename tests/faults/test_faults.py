"""Thousands of faults: training goes on, or stops with a clear error and everything as it was before the step."""

from collections import Counter
from copy import deepcopy

import pytest
from torch import Tensor

from ..optimizer.cases import METHODS, Method, live_hooks, vector
from .injector import ERRORS, FAULTS, TASKS, Fault, Run, Task, each_line

ROUNDS = 2  # how often every kind comes in a run


def kinds(method: Method, task: Task) -> list[str]:
    return [name for name, fault in FAULTS.items() if fault.applies(method, task)]


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, NaN that was put there included."""
    return a.allclose(b, rtol=0, atol=0, equal_nan=True)


def survive(run: Run, name: str, fault: Fault) -> None:
    """Inject one fault and look at what has become of it."""
    while fault.measuring and not run.optimizer._due():
        run.step()
    before, steps = run.state(), run.optimizer._schedule.t
    raised: BaseException | None = None
    try:
        fault.inject(run)
    except (*ERRORS, LookupError) as error:
        raised = error
    assert vector(run.model).isfinite().all(), name
    made = run.optimizer._schedule.t - steps
    if fault.outcome in ("raised", "raised after") or (fault.outcome == "interrupted" and not _over(raised)):
        assert raised is not None, name
        assert raised.args == ("injected",), (name, raised)
    elif fault.outcome != "interrupted":
        assert raised is None, (name, raised)
        assert made == 1, name
    if fault.outcome == "raised" or (raised is not None and made == 0):
        after = run.state()
        assert before.keys() == after.keys(), name
        changed = [key for key in before if not same(before[key], after[key])]
        assert not changed, (name, changed)
    if fault.outcome == "raised after":
        assert made == 1
    if fault.outcome == "skipped":
        moved = [n for n, p in run.model.named_parameters() if not before[f"parameter {n}"].equal(p)]
        assert not moved, (name, moved)
    run.fired[name] += 1


def _over(raised: BaseException | None) -> bool:
    return isinstance(raised, LookupError)


# Fused attention has no second derivative.
PAIRS = [(method, task) for method in METHODS for task in TASKS if (method, task) != ("reng-double", "transformer")]


@pytest.mark.parametrize(("name_of_method", "task"), PAIRS)
def test_faults(name_of_method: str, task: str) -> None:
    method = METHODS[name_of_method]
    run = Run(method, TASKS[task], seed=len(method.name))
    for _ in range(3):
        run.step()
    count = Counter[str]()
    run.step(around=each_line(run.optimizer, lambda: count.update(["lines"])))
    run.lines, hooks = count["lines"], live_hooks(run.model)
    order = kinds(method, run.task) * ROUNDS
    run.random.shuffle(order)
    for name in order:
        known = deepcopy(run.optimizer.state_dict())
        survive(run, name, FAULTS[name])
        # What is huge fades from an average over hundreds of steps: then a checkpoint of before is loaded.
        run.optimizer.load_state_dict(known if "huge" in name else run.optimizer.state_dict())
        run.step()
        assert live_hooks(run.model) == hooks, name
        assert vector(run.model).isfinite().all(), name
    for name in order:
        assert run.fired[name] == ROUNDS, name
    batch = run.batch()
    losses = [run.step(batch) for _ in range(40)]  # momentum remembers some
    assert min(losses[1:]) < losses[0], losses
    run.optimizer.close()
    assert live_hooks(run.model) == 0


def test_how_many() -> None:
    """The number of faults that the test above injects."""
    total = Counter[str]()
    for method, task in PAIRS:
        total.update(kinds(METHODS[method], TASKS[task]) * ROUNDS)
    assert sum(total.values()) >= 4000
    assert min(total.values()) >= 20
