"""Decompositions and inverses against single matrices, and the ladders that they climb where one resists."""

import sys
from typing import Any

import pytest
import torch
from grng.kernels import damped_inverse, eigh, newton_inverse
from torch import Tensor

solve = sys.modules["grng.kernels.solve"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def with_spectrum(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis."""
    U = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    A = (U * torch.tensor(values, dtype=torch.float64)) @ U.mT
    return ((A + A.mT) / 2).to(dtype)


def spread(low: float, high: float, n: int) -> list[float]:
    return torch.logspace(low, high, n, dtype=torch.float64).tolist()


# Matrices as statistics leave them: eigenvalues.
SPECTRA = {
    "well conditioned": spread(-1, 1, 6),
    "near singular": spread(-14, 0, 6),
    "rank one": [0, 0, 0, 0, 0, 1.0],
    "zero": [0.0] * 6,
    "identity": [1.0] * 6,
    "huge": spread(20, 25, 6),
    "tiny": spread(-25, -20, 6),
    "slightly negative": [-1e-9, 0, 1e-3, 1, 1, 2],
}


def tolerance(dtype: torch.dtype) -> float:
    return 50 * torch.finfo(dtype).eps


@DTYPES
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("case", SPECTRA)
def test_eigh(case: str, k: int, dtype: torch.dtype) -> None:
    stack = torch.stack([with_spectrum(*SPECTRA[case], dtype=dtype) for _ in range(k)])
    w, U, failed = eigh(stack)
    assert not failed.any()
    assert (w >= 0).all()
    assert (w.diff(dim=1) >= 0).all()
    for j in range(k):
        largest = max(abs(v) for v in SPECTRA[case])
        exact = torch.tensor(sorted(max(v, 0) for v in SPECTRA[case])).to(dtype)
        assert (w[j] - exact).abs().max() <= tolerance(dtype) * largest
        assert (U[j].T @ U[j] - torch.eye(6, dtype=dtype)).abs().max() < tolerance(dtype)
        # Cut off at zero: what a slightly negative eigenvalue contributed is gone.
        cut = abs(min(*SPECTRA[case], 0))
        assert (U[j] * w[j] @ U[j].T - stack[j]).abs().max() <= tolerance(dtype) * largest + cut


@pytest.mark.parametrize("n", [2, 31, 32, 40])
def test_eigh_of_a_stack_is_that_of_its_members(n: int) -> None:
    """On either side of the size from which a CPU takes them one by one."""
    stack = torch.stack([with_spectrum(*spread(-2, 1, n)) for _ in range(3)])
    w, U, _ = eigh(stack)
    for j, A in enumerate(stack):
        torch.testing.assert_close(w[j], torch.linalg.eigvalsh(A))
        torch.testing.assert_close(U[j] * w[j] @ U[j].T, A)


def stubborn(monkeypatch: pytest.MonkeyPatch, fails: Any) -> list[tuple[torch.dtype, int]]:
    """torch.linalg.eigh that does not converge where `fails(matrix)`; returns the list of its calls."""
    known, calls = torch.linalg.eigh, []

    def attempt(A: Tensor) -> Any:
        calls.append((A.dtype, A.ndim))
        if fails(A):
            raise torch.linalg.LinAlgError("did not converge")
        return known(A)

    monkeypatch.setattr(torch.linalg, "eigh", attempt)
    return calls


@pytest.mark.parametrize("n", [4, 40])
def test_eigh_tries_float64(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.stack([with_spectrum(*spread(-1, 1, n), dtype=torch.float32) for _ in range(2)])
    calls = stubborn(monkeypatch, lambda A: A.dtype == torch.float32)
    w, U, failed = eigh(stack)
    assert not failed.any()
    assert w.dtype == U.dtype == torch.float32
    assert calls.count((torch.float64, 2)) == 2
    torch.testing.assert_close((U * w.unsqueeze(1)) @ U.mT, stack, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [4, 40])
def test_eigh_marks_what_resists(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The diagonal and the axes for that member, the others as ever."""
    stack = torch.stack([with_spectrum(*spread(-1, 1, n)) for _ in range(3)])
    stack[1] *= 1000
    stubborn(monkeypatch, lambda A: A.abs().max() > 50)
    w, U, failed = eigh(stack)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(w[1], stack[1].diagonal().clamp(min=0))
    assert torch.equal(U[1], torch.eye(n))
    torch.testing.assert_close((U[::2] * w[::2].unsqueeze(1)) @ U[::2].mT, stack[::2])


def test_eigh_takes_more_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before float64: a multiple of the identity, which is taken off the eigenvalues again."""
    stack = with_spectrum(*spread(-1, 1, 4), dtype=torch.float32)[None]
    calls = stubborn(monkeypatch, lambda A: torch.equal(A.reshape(4, 4), stack[0]))
    w, U, failed = eigh(stack)
    assert not failed.any()
    assert (torch.float64, 2) not in calls
    torch.testing.assert_close((U * w.unsqueeze(1)) @ U.mT, stack, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [4, 40])
def test_eigh_that_gives_nan(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an error, of a matrix that is well: seen, and treated as one that does not converge."""
    known = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: (known(A)[0], known(A)[1] * float("nan")))
    stack = torch.stack([with_spectrum(*spread(-1, 1, n)) for _ in range(2)])
    w, U, failed = eigh(stack)
    assert failed.all()
    assert torch.equal(w, stack.diagonal(dim1=1, dim2=2))
    assert torch.equal(U, torch.eye(n).expand(2, -1, -1))


@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, 0)])
def test_eigh_of_what_is_not_finite_fails_without_an_error(place: tuple[int, int], bad: float, n: int) -> None:
    """Whether LAPACK complains or returns NaN."""
    stack = torch.eye(n).repeat(2, 1, 1)
    stack[0, place[0], place[1]] = bad
    w, U, failed = eigh(stack)
    assert failed.tolist() == [True, False]
    assert w.isfinite().all()
    assert U.isfinite().all()


# Damped inverses.


@DTYPES
@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("case", ["well conditioned", "near singular", "rank one", "zero", "identity"])
def test_damped_inverse(case: str, damping: float, dtype: torch.dtype) -> None:
    stack = torch.stack([with_spectrum(*SPECTRA[case], dtype=dtype) for _ in range(3)])
    d = damping * torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    X, failed = damped_inverse(stack, d)
    assert not failed.any()
    for j in range(3):
        exact = torch.linalg.inv(stack[j].double() + d[j].double() * torch.eye(6))
        assert (X[j] - exact).norm() / exact.norm() < 2e4 * torch.finfo(dtype).eps


def test_damped_inverse_leaves_its_argument_alone() -> None:
    stack = torch.stack([with_spectrum(-1, 1, 1), with_spectrum(1, 2, 3)])
    before = stack.clone()
    damped_inverse(stack, torch.full((2,), 0.5))
    assert torch.equal(stack, before)


# The most negative eigenvalue, in units of the damping, and the damping that is taken in its place.
RUNGS = [(-0.5, 1), (-5.0, 10), (-50.0, 100), (-500.0, 1000)]


@DTYPES
@pytest.mark.parametrize(("lowest", "times"), RUNGS)
@pytest.mark.parametrize("damping", [1e-4, 1.0])
def test_damped_inverse_of_the_indefinite_takes_more_damping(
    damping: float, lowest: float, times: int, dtype: torch.dtype
) -> None:
    """Each member climbs for itself: the second is well and keeps its own damping."""
    stack = torch.stack([with_spectrum(lowest * damping, damping, 2 * damping), with_spectrum(1, 2, 3)]).to(dtype)
    X, failed = damped_inverse(stack, torch.full((2,), damping, dtype=dtype))
    assert not failed.any()
    exact = torch.linalg.inv(stack[0].double() + times * damping * torch.eye(3))
    assert (X[0] - exact).norm() / exact.norm() < 1e3 * torch.finfo(dtype).eps
    exact = torch.linalg.inv(stack[1].double() + damping * torch.eye(3))
    assert (X[1] - exact).norm() / exact.norm() < 1e2 * torch.finfo(dtype).eps


@DTYPES
def test_damped_inverse_marks_what_resists(dtype: torch.dtype) -> None:
    """The inverse of the diagonal with the last damping, finite and flagged; the caller keeps the previous inverse."""
    stack = torch.stack([with_spectrum(1, 2, 3), with_spectrum(-5000, 1, 1), with_spectrum(1, 1, 1)]).to(dtype)
    stack[2, 0, 0] = float("nan")
    X, failed = damped_inverse(stack, torch.ones(3, dtype=dtype))
    assert failed.tolist() == [False, True, True]
    for j in (1, 2):
        diagonal = stack[j].diagonal().nan_to_num(0).clamp(min=0)
        torch.testing.assert_close(X[j], (1 / (diagonal + 1000)).diag())
    torch.testing.assert_close(X[0], torch.linalg.inv(stack[0] + torch.eye(3, dtype=dtype)))


def test_damped_inverse_in_float64_on_the_last_rung() -> None:
    """A float32 matrix of low rank, and a damping that float32 does not resolve even a thousandfold."""
    rows = torch.randn(300, 8, dtype=torch.float32)
    A = rows @ rows.T
    A /= A.norm()
    X, failed = damped_inverse(A[None], torch.tensor([1e-11], dtype=torch.float32))
    assert not failed.any()
    assert X.dtype == torch.float32
    exact = torch.linalg.inv(A.double() + 1e-8 * torch.eye(300))
    assert (X[0] - exact).norm() / exact.norm() < 1e-5


# Newton's iteration.


def rounds_expected(A: Tensor, tolerance: float) -> float:
    """log2(kappa ln(1/tolerance)), kappa = ||A||_F / lambda_min."""
    kappa = A.norm() / torch.linalg.eigvalsh(A)[0]
    return torch.log2(kappa * torch.log(torch.tensor(1 / tolerance))).item()


@pytest.mark.parametrize("tolerance", [1e-4, 1e-9])
@pytest.mark.parametrize("decades", [0, 1, 2, 3, 4])
def test_newton_rounds_follow_the_condition(decades: int, tolerance: float) -> None:
    A = with_spectrum(*spread(-decades, 0, 7))
    X, rounds, residual = newton_inverse(A[None], tolerance=tolerance, max_rounds=40)
    assert abs(rounds.item() - rounds_expected(A, tolerance)) <= 1
    assert residual.item() < tolerance
    assert residual.item() == pytest.approx((torch.eye(7) - A @ X[0]).norm().item(), rel=1e-3, abs=1e-12)
    exact = torch.linalg.inv(A)
    assert (X[0] - exact).norm() / exact.norm() < 1.1 * tolerance


def test_newton_members_stop_for_themselves() -> None:
    """A converged member stays as it is, to the bit, while others go on."""
    easy, hard = with_spectrum(1, 1.5, 2), with_spectrum(1e-4, 1, 2)
    both, rounds, residual = newton_inverse(torch.stack([easy, hard]))
    alone, rounds_alone, _ = newton_inverse(easy[None])
    assert torch.equal(both[0], alone[0])
    assert rounds[0] == rounds_alone[0]
    assert rounds[1] > rounds[0] + 5
    assert (residual < 1e-4).all()


@pytest.mark.parametrize("change", [0.0, 1e-3, 0.05])
def test_newton_starts_warm(change: float) -> None:
    """From the inverse of a slightly older matrix two or three rounds do; from the inverse itself none."""
    A, B = with_spectrum(*spread(-2, 0, 8)), with_spectrum(*spread(-2, 0, 8))
    start = torch.linalg.inv(A)
    now = (1 - change) * A + change * B / torch.linalg.eigvalsh(torch.linalg.solve(A, B)).abs().max()
    X, rounds, residual = newton_inverse(now[None], start[None])
    _, cold, _ = newton_inverse(now[None])
    assert residual.item() < 1e-4
    assert rounds.item() <= (0 if change == 0 else 3)
    assert cold.item() > 7
    exact = torch.linalg.inv(now)
    assert (X[0] - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("start", ["zero", "far", "nan", "infinite"])
def test_newton_ignores_a_start_that_is_too_far(start: str) -> None:
    """||I - A X||_F >= 0.9 may diverge: that member starts from scratch, and only that one."""
    A = torch.stack([with_spectrum(1, 2, 3), with_spectrum(1, 2, 4)])
    good = torch.linalg.inv(A[1])
    bad = {"zero": 0.0, "far": 10.0, "nan": float("nan"), "infinite": float("inf")}[start]
    X, rounds, _ = newton_inverse(A, torch.stack([bad * torch.eye(3), good]))
    cold, cold_rounds, _ = newton_inverse(A[:1])
    assert torch.equal(X[0], cold[0])
    assert rounds.tolist() == [cold_rounds.item(), 0]


@DTYPES
def test_newton_stops_at_the_limit_and_says_how_far_it_is(dtype: torch.dtype) -> None:
    """Beyond the reach of 25 rounds the residual tells the caller; nothing is NaN."""
    A = with_spectrum(*spread(-12, 0, 6), dtype=dtype)[None]
    X, rounds, residual = newton_inverse(A)
    assert rounds.item() == 25
    assert residual.item() > 1e-2
    assert X.isfinite().all()


@pytest.mark.parametrize("max_rounds", [0, 1, 3])
def test_newton_takes_at_most_max_rounds(max_rounds: int) -> None:
    A = with_spectrum(0.01, 1, 2)
    X, rounds, _ = newton_inverse(A[None], max_rounds=max_rounds)
    expected = torch.eye(3) / A.norm()
    for _ in range(max_rounds):
        expected = 2 * expected - expected @ A @ expected
    assert rounds.item() == max_rounds
    torch.testing.assert_close(X[0], expected)


def test_newton_in_float32_reaches_its_tolerance() -> None:
    A = torch.stack([with_spectrum(*spread(-2, 1, 16), dtype=torch.float32) for _ in range(3)])
    X, rounds, residual = newton_inverse(A)
    assert (residual < 1e-4).all()
    assert (rounds <= 25).all()
    exact = torch.stack([torch.linalg.inv(a.double()) for a in A])
    assert ((X - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1) < 1e-3).all()


def test_newton_of_a_matrix_that_is_not_finite_touches_no_other() -> None:
    A = torch.stack([with_spectrum(1, 2, 3), torch.full((3, 3), float("nan"))])
    X, _, residual = newton_inverse(A)
    torch.testing.assert_close(X[0], torch.linalg.inv(A[0]), rtol=1e-3, atol=1e-3)
    assert residual[0] < 1e-4
    assert not residual[1] < 1e-2  # what the caller asks


@pytest.mark.parametrize("n", [1, 2])
def test_small_matrices(n: int) -> None:
    A = with_spectrum(*([2.0] * n))[None]
    torch.testing.assert_close(damped_inverse(A, torch.ones(1))[0], torch.eye(n)[None] / 3)
    torch.testing.assert_close(newton_inverse(A, tolerance=1e-12)[0], torch.eye(n)[None] / 2)
    torch.testing.assert_close(eigh(A)[0], torch.full((1, n), 2.0))


def test_batched_lu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is broken, partly silently, in some builds of torch."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("LU")

    for name in ("inv", "inv_ex", "solve", "lu", "lu_factor", "lu_solve", "det", "slogdet"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    A = torch.stack([torch.eye(40) + 0.1, -torch.eye(40)])
    results = [*eigh(A.clone()), *damped_inverse(A, torch.ones(2)), *newton_inverse(A[:1])]
    assert all(torch.isfinite(result).all() for result in results)
