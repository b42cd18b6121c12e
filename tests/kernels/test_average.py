"""The running average against its definition, observation by observation."""

import pytest
import torch
from grng.kernels import ema_
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def reference(values: list[Tensor], decay: float) -> Tensor:
    """sum_i b^(t-i) v_i / sum_i b^(t-i)."""
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4), (3, 2, 2)])
def test_is_the_weighted_mean_of_all_observations(shape: tuple[int, ...], decay: float) -> None:
    average, count = torch.zeros(shape), torch.zeros(shape[0])
    everything = torch.ones(shape[0], dtype=torch.bool)
    values = []
    for t in range(6):
        values.append(torch.randn(shape))
        ema_(average, count, values[-1], decay, everything)
        torch.testing.assert_close(average, reference(values, decay), rtol=1e-12, atol=1e-14)
        assert (count == t + 1).all()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_after_the_first_observation_it_is_that_observation(dtype: torch.dtype, decay: float) -> None:
    """To the bit, whatever stood there before."""
    average, count = torch.full((3, 4), 7.0, dtype=dtype), torch.zeros(3, dtype=dtype)
    new = torch.randn(3, 4, dtype=dtype)
    ema_(average, count, new, decay, torch.ones(3, dtype=torch.bool))
    assert torch.equal(average, new)


def test_members_count_for_themselves() -> None:
    """Every member sees its own observations only."""
    average, count = torch.zeros(3, 2), torch.zeros(3)
    values: list[list[Tensor]] = [[], [], []]
    for seen in ([1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]):
        observed, new = torch.tensor(seen, dtype=torch.bool), torch.randn(3, 2)
        ema_(average, count, new, 0.9, observed)
        for j in range(3):
            values[j] += [new[j]] * seen[j]
    assert count.tolist() == [3, 3, 0]
    for j in (0, 1):
        torch.testing.assert_close(average[j], reference(values[j], 0.9), rtol=1e-12, atol=1e-14)
    assert average[2].tolist() == [0, 0]


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("before", [0, 2])
def test_what_is_not_finite_changes_nothing(before: int, bad: float, decay: float) -> None:
    """Neither average nor count of that member; the others go on."""
    average, count = torch.zeros(2, 2, 2), torch.zeros(2)
    both = torch.ones(2, dtype=torch.bool)
    for _ in range(before):
        ema_(average, count, torch.randn(2, 2, 2), decay, both)
    kept = average.clone()
    new = torch.randn(2, 2, 2)
    new[1, 0, 1] = bad
    ema_(average, count, new, decay, both)
    assert torch.equal(average[1], kept[1])
    assert count.tolist() == [before + 1, before]
    assert average.isfinite().all()


def test_infinities_of_both_signs_do_not_cancel() -> None:
    average, count = torch.zeros(1, 2), torch.zeros(1)
    ema_(average, count, torch.tensor([[INF, -INF]]), 0.9, torch.tensor([True]))
    assert (average.tolist(), count.tolist()) == ([[0, 0]], [0])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_an_unobserved_member_may_hold_anything(bad: float) -> None:
    average, count = torch.ones(2, 1), torch.ones(2)
    ema_(average, count, torch.tensor([[bad], [3.0]]), 1.0, torch.tensor([False, True]))
    assert average.flatten().tolist() == [1, 2]


def test_works_on_views_in_place() -> None:
    whole, counts = torch.zeros(5, 2), torch.zeros(5)
    ema_(whole[1:3], counts[1:3], torch.ones(2, 2), 0.9, torch.ones(2, dtype=torch.bool))
    assert whole.sum(1).tolist() == [0, 2, 2, 0, 0]
    assert counts.tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("observed", [True, False])
def test_an_average_that_is_not_finite_starts_anew(observed: bool, bad: float) -> None:
    """With the next observation, as the first one; the other members go on."""
    average, count = torch.tensor([[2.0, bad], [2.0, 2.0]]), torch.full((2,), 5.0)
    ema_(average, count, torch.full((2, 2), 4.0), 0.5, torch.tensor([observed, True]))
    assert average[0].tolist() == ([4, 4] if observed else [0, 0])
    assert count.tolist() == [float(observed), 6]
    assert average[1].tolist() == pytest.approx([2 + 2 * 0.5 / (1 - 0.5**6)] * 2)
