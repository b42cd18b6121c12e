"""Checkpoints and copies, for every optimizer: what is saved comes back, and no more than that changes."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import Contract, Run, TestCase, batches, contracts, instantiate_device_type_tests, parametrize

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def through_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To the bit, in name, order, dtype and value."""
    assert list(mine) == list(theirs)
    different = [
        name for name in mine if mine[name].dtype != theirs[name].dtype or not torch.equal(mine[name], theirs[name])
    ]
    assert not different


def through_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": through_pickle}


class TestState(TestCase):
    @contracts()
    def test_deterministic(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Equal runs have equal checkpoints, entry for entry; to ask for one changes nothing, also not the next."""
        asked, silent = Run(optim_info), Run(optim_info)
        for batch in batches(3):
            silent.steps([batch])
            asked.steps([batch])
            assert_same(asked.state, asked.state)
        assert_same(asked.state, silent.state)
        assert asked.state or optim_info.name == "SGD"
        assert asked.groups == silent.groups
        assert torch.equal(asked.vector, silent.vector)

    @contracts(*DTYPES, where=lambda info: info.name != "NAdamW")
    def test_round_trip(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Through torch.save and a weights_only load all of the state comes back in its own dtype, so that the further
        steps are the same to the bit; from then on nobody writes into what was loaded. Not so torch's NAdam, whose
        float32 product of momenta is cast."""
        straight, resumed = Run(optim_info, dtype), Run(optim_info, dtype, seed=5)
        straight.steps(batches(3, dtype))
        saved = through_file([straight.model.state_dict(), straight.optimizer.state_dict()])
        untouched = copy.deepcopy(saved)
        resumed.steps(batches(1, dtype))
        resumed.model.load_state_dict(saved[0])
        resumed.optimizer.load_state_dict(saved[1])
        assert_same(resumed.state, straight.state)
        assert resumed.groups == straight.groups
        for run in (straight, resumed):
            run.steps(batches(5, dtype)[3:])
        assert torch.equal(resumed.vector, straight.vector)
        assert_same(resumed.state, straight.state)
        if optim_info.exact:
            again = Run(optim_info, dtype)
            again.optimizer.load_state_dict(saved[1])
            first = again.state
            again.optimizer.load_state_dict(untouched[1])
            assert_same(first, again.state)

    @contracts(torch.float32)
    def test_checkpoint_of_another_precision(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """What bfloat16 weights left goes on with float32 ones, and the other way round."""
        for theirs in (torch.bfloat16, torch.float64):
            written, read = Run(optim_info, theirs), Run(optim_info, dtype)
            written.steps(batches(3, theirs))
            read.model.load_state_dict(written.model.state_dict())
            read.optimizer.load_state_dict(through_file(written.optimizer.state_dict()))
            losses = read.steps(batches(1, dtype) * 4)
            assert losses[-1] < losses[0]
            assert read.vector.dtype == dtype

    @contracts()
    def test_hooks(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Of state_dict and load_state_dict, before and after, in the order asked for; what they return is taken; the
        last ones see the optimizer restored."""
        run, other, events = Run(optim_info), Run(optim_info), []
        run.steps(batches(3))

        def note(event: str, result: Callable[[Any], Any] = lambda saved: None) -> Callable[..., Any]:
            def hook(_: Any, *saved: Any) -> Any:
                events.append(event)
                return result(*saved) if saved else None

            return hook

        run.optimizer.register_state_dict_pre_hook(note("second before"))
        run.optimizer.register_state_dict_pre_hook(note("first before"), prepend=True)
        run.optimizer.register_state_dict_post_hook(note("wrap", lambda saved: {"inner": saved}))
        run.optimizer.register_state_dict_post_hook(
            note("first after", lambda saved: {**saved, "more": 1}), prepend=True
        )
        saved = run.optimizer.state_dict()
        assert events == ["first before", "second before", "first after", "wrap"]
        assert saved["inner"]["more"] == 1
        events.clear()
        other.optimizer.register_load_state_dict_pre_hook(note("second", lambda saved: saved["inner"]))
        other.optimizer.register_load_state_dict_pre_hook(note("first"), prepend=True)
        other.optimizer.register_load_state_dict_post_hook(note("fourth"))
        other.optimizer.register_load_state_dict_post_hook(lambda o: states.append(other.state))
        other.optimizer.register_load_state_dict_post_hook(note("third"), prepend=True)
        states: list[dict[str, Tensor]] = []
        other.optimizer.load_state_dict(saved)
        assert events == ["first", "second", "third", "fourth"]
        assert_same(states[0], other.state)

    @contracts(torch.float32, where=lambda info: bool(info.older))
    def test_older_checkpoints(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """A setting that is younger than the checkpoint stays as the optimizer was built with."""
        straight = Run(optim_info, dtype)
        straight.steps(batches(3, dtype))
        saved = through_file([straight.model.state_dict(), straight.optimizer.state_dict()])
        for group in saved[1]["param_groups"]:
            for name in optim_info.older:
                del group[name]
        resumed = Run(optim_info, dtype, seed=5)
        resumed.model.load_state_dict(saved[0])
        resumed.optimizer.load_state_dict(saved[1])
        assert resumed.groups == straight.groups
        for run in (straight, resumed):
            run.steps(batches(5, dtype)[3:])
        assert torch.equal(resumed.vector, straight.vector)

    @contracts()
    def test_checkpoints_that_do_not_fit(self, device: str, dtype: torch.dtype, optim_info: Contract) -> None:
        """Another number of groups, or of parameters in one, is refused, and nothing changes."""
        run = Run(optim_info)
        run.steps(batches(2))
        before, groups = run.state, run.groups
        fewer, shorter = copy.deepcopy(run.optimizer.state_dict()), copy.deepcopy(run.optimizer.state_dict())
        fewer["param_groups"].append(fewer["param_groups"][0])
        shorter["param_groups"][0]["params"].pop()
        for saved in (fewer, shorter):
            with pytest.raises(ValueError, match=r"loaded state dict .*group|checkpoint"):
                run.optimizer.load_state_dict(saved)
            assert_same(run.state, before)
            assert run.groups == groups

    @parametrize("how", list(COPIES))
    @contracts()
    def test_copies(self, device: str, dtype: torch.dtype, optim_info: Contract, how: str) -> None:
        """Model and optimizer together go on alike and apart, with every public attribute; what is attached to its
        model refuses, and goes on itself."""
        run, expected = Run(optim_info), Run(optim_info)
        for each in (run, expected):
            each.steps(batches(3))
        if optim_info.attached:
            with pytest.raises(
                TypeError, match=r"attached to its model and cannot be copied or pickled: save state_dict"
            ):
                COPIES[how](run.optimizer)
            twin = run
        else:
            twin = copy.copy(run)
            twin.model, twin.optimizer = COPIES[how]((run.model, run.optimizer))
            public = {name for name in vars(run.optimizer) if not name.startswith("_")}
            assert public <= vars(twin.optimizer).keys()
            assert_same(twin.state, run.state)
            assert twin.groups == run.groups
        for each in (twin, expected):
            each.steps(batches(5)[3:])
        assert torch.equal(twin.vector, expected.vector)
        if twin is not run:
            assert not torch.equal(run.vector, twin.vector)
            run.steps(batches(5)[3:])
            assert torch.equal(run.vector, expected.vector)


instantiate_device_type_tests(TestState, globals(), only_for="cpu")
