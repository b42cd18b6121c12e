"""Hooks come and go with the optimizer; the model stays a model that can be saved, pickled and copied."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng import GRNG, Curvature

from .cases import METHODS, Method, cnn, live_hooks, methods, mixed, stream, train, vector

ENGINES = ["backpack", "hooks"]


def float_mixed() -> nn.Sequential:
    return mixed(torch.float32)


def batches_of(steps: int) -> list[tuple[Tensor, Tensor]]:
    return stream(steps, dtype=torch.float32)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("end", ["close", "with", "error in with", "collected", "closed twice"])
@methods("ring", "kalman-vd")
def test_hooks_are_removed(method: Method, end: str, steps: int, engine: Any) -> None:
    model = float_mixed()
    attributes = [set(vars(module)) for module in model.modules()]
    optimizer = method(model, curvature=Curvature(capture=engine))
    train(optimizer, model, batches_of(steps))
    assert live_hooks(model) > 0
    if end == "close":
        optimizer.close()
    elif end == "closed twice":
        optimizer.close()
        optimizer.close()
    elif end == "with":
        with optimizer:
            train(optimizer, model, batches_of(1))
    elif end == "error in with":
        fail_after_forward = pytest.raises(KeyError)
        with fail_after_forward, optimizer:
            cross_entropy(model(batches_of(1)[0][0]), batches_of(1)[0][1])
            raise KeyError
    else:
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None
    assert live_hooks(model) == 0
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_model_is_collected_with_its_optimizer() -> None:
    model = float_mixed()
    optimizer = METHODS["ring"](model)
    train(optimizer, model, batches_of(2))
    gone = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@methods("ring", "reng-double", "reng-finite", "kalman-vd")
def test_no_cycle(method: Method) -> None:
    """The last reference takes the optimizer along, without the garbage collector."""
    optimizer = method(float_mixed())
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_hooks_of_others_stay() -> None:
    model, calls = float_mixed(), []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].weight.register_post_accumulate_grad_hook(lambda *_: calls.append("grad"))
    with METHODS["ring"](model) as optimizer:
        train(optimizer, model, batches_of(2))
    calls.clear()
    model(batches_of(1)[0][0]).sum().backward()
    assert calls == ["forward", "grad"]


def test_attach_again_after_close() -> None:
    model = float_mixed()
    for name in ("ring", "kalman-vd", "ekfac"):
        optimizer = METHODS[name](model)
        losses = train(optimizer, model, batches_of(1) * 3)
        assert optimizer.diagnostics["refreshes"].item() == 3
        assert losses[-1] < losses[0]
        optimizer.close()
    assert live_hooks(model) == 0


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": through_pickle,
    "torch.save": through_torch_save,
    "deepcopy": copy.deepcopy,
}


def assert_independent(copied: nn.Module, model: nn.Module) -> None:
    """No hook of the copy acts, it equals the model, and it trains with a GRNG of its own."""
    assert torch.equal(vector(copied), vector(model))
    for module in copied.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks += [*module._state_dict_pre_hooks.values(), *module._backward_hooks.values()]
        assert not any(type(hook).__module__.startswith("grng") for hook in hooks)
        assert not any(name.startswith("input0") or name == "output" for name in vars(module))
    before = vector(model)
    with METHODS["ring"](copied) as optimizer:
        losses = train(optimizer, copied, batches_of(1) * 5)
        assert optimizer.diagnostics["refreshes"].item() == 5
    assert losses[-1] < losses[0]
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("when", ["attached", "after forward", "after backward", "after step", "second after forward"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_while_attached(how: str, when: str, engine: Any) -> None:
    """At any moment of the loop; and the loop goes on as if nothing had happened."""
    ends = []
    for take in (True, False):
        model, batches = float_mixed(), batches_of(3)
        with GRNG(model, "ring", curvature=Curvature(capture=engine)) as optimizer:

            def look(now: str, take: bool = take, model: nn.Module = model) -> None:
                if take and now == when:
                    assert_independent(COPIES[how](model), model)

            look("attached")
            for i, (x, y) in enumerate(batches):
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                look("second after forward" if i else "after forward")
                loss.backward()
                look("after backward")
                optimizer.step()
                look("after step")
        ends.append(vector(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("how", COPIES)
def test_copy_loads_without_grng(how: str) -> None:
    """What travels with a copy of the model is made of the standard library alone."""
    model = float_mixed()
    with METHODS["ring"](model) as optimizer:
        train(optimizer, model, batches_of(1))
        copied = COPIES[how](model)
        assert b"grng" not in pickle.dumps(model)
    twice = COPIES[how](copied)
    assert torch.equal(vector(twice), vector(copied))
    assert b"grng" not in pickle.dumps(twice)
    assert copied.state_dict().keys() == float_mixed().state_dict().keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_state_dict_of_the_model(engine: Any) -> None:
    """Keys and values are those of a model that nothing is attached to."""
    model = cnn()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    with GRNG(model, "ring", lr=0.0, fallback_lr=0.0, curvature=Curvature(capture=engine)) as optimizer:
        model.eval()
        for x, y in [(torch.randn(4, 1, 6, 6), torch.randint(3, (4,)))] * 2:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        attached = model.state_dict()
        assert attached.keys() == plain.keys()
        assert all(torch.equal(attached[name], plain[name]) for name in plain)
        model.load_state_dict(plain)


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *(("ring", "backpack"), ("kalman-vd", "backpack"), ("ekfac", "hooks"), ("reng-double", "hooks")),
    ],
)
def test_memory_is_flat(name: str, engine: Any) -> None:
    """The number of live tensors is the same after 20 steps as after 1,000."""
    method = METHODS[name]
    model, counts = float_mixed(), []
    (batch,) = batches_of(1)
    with method(model, curvature=Curvature(capture=engine, stats_every=3)) as optimizer:
        for steps in (20, 980):
            train(optimizer, model, [batch] * steps)
            counts.append(tensors_alive())
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_without_garbage_collection(engine: Any) -> None:
    """No reference cycle holds a graph: the activations of a step go when the step is over."""
    model, (batch,) = float_mixed(), batches_of(1)
    with GRNG(model, "ring", curvature=Curvature(capture=engine)) as optimizer:
        train(optimizer, model, [batch] * 12)
        gc.collect()
        gc.disable()
        try:
            found = []
            for _ in range(2):
                train(optimizer, model, [batch] * 20)
                found.append(sum(issubclass(type(o), Tensor) and o.grad_fn is not None for o in gc.get_objects()))
        finally:
            gc.enable()
    assert found[1] <= found[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_between_steps(engine: Any) -> None:
    """Forward passes without gradients, and under eval(), change nothing."""
    ends = []
    for evaluate in (False, True):
        model = float_mixed()
        with GRNG(model, "ring", curvature=Curvature(capture=engine)) as optimizer:
            for x, y in batches_of(4):
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                if evaluate:
                    with torch.no_grad():
                        model(x[:2])
                    with torch.inference_mode():
                        model(x[:3])
                loss.backward()
                optimizer.step()
        ends.append(vector(model))
    assert torch.equal(*ends)
