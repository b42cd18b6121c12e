"""What the gradient at the model's output reveals, and the gradients with drawn labels that are made of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    hinge_embedding_loss,
    mse_loss,
    multi_margin_loss,
    nll_loss,
)

from grng import GRNGWarning
from grng.curvature.likelihood import (
    CODES,
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    LogCategorical,
    SoftBernoulli,
    Unread,
    detect,
)

from .harness import Attached, measure
from .reference import relative

Loss = Callable[[Tensor], Tensor]
Loss2 = Callable[[Tensor, Tensor], Tensor]
BATCHES = pytest.mark.parametrize("B", [1, 3, 8])


def output_gradient(f: Tensor, loss: Loss) -> Tensor:
    leaf = f.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def labels(shape: tuple[int, ...], classes: int = 5, kept: float = 1.0) -> Tensor:
    """Labels, some of them -100; the first always counts."""
    y = torch.randint(classes, shape)
    y[torch.rand(shape) >= kept] = -100
    y.view(-1)[0] = 1
    return y


# outputs' shape -> logits -> output of the model; loss from an output and the labels
HARD: dict[str, tuple[tuple[int, ...], type[Likelihood], int, Callable[[Tensor], Tensor]]] = {
    "logits (B, C)": ((5,), Categorical, -1, lambda f: f),
    "logits (B, T, C)": ((4, 5), Categorical, -1, lambda f: f),
    "logits (B, C, T)": ((5, 4), Categorical, 1, lambda f: f),
    "logits (B, C, T), T = C": ((5, 5), Categorical, 1, lambda f: f),
    "logits (B, C, H, W)": ((5, 3, 2), Categorical, 1, lambda f: f),
    "log-probabilities (B, C)": ((5,), LogCategorical, -1, lambda f: f.log_softmax(-1)),
    "log-probabilities (B, C, T)": ((5, 4), LogCategorical, 1, lambda f: f.log_softmax(1)),
    "two classes": ((2,), Categorical, -1, lambda f: f),
}
SCALES = {"mean": 1.0, "times 1024": 1024.0, "over 7": 1 / 7}


@BATCHES
@pytest.mark.parametrize("kept", [1.0, 0.5])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", HARD)
def test_classes_are_read_exactly(case: str, reduction: str, scale: str, kept: float, B: int) -> None:
    """The likelihood, where its classes are, N = (number of labels or 1) / scale, and which rows count."""
    shape, kind, dim, make = HARD[case]
    f = make(torch.randn(B, *shape))
    rows = f.movedim(dim, -1)
    y = labels(tuple(rows.shape[:-1]), rows.shape[-1], kept)

    def loss(f: Tensor) -> Tensor:
        flat = f.movedim(dim, -1).flatten(0, -2)
        each = nll_loss if kind is LogCategorical else cross_entropy
        return SCALES[scale] * each(flat, y.flatten(), reduction=reduction)

    gradient = output_gradient(f, loss)
    likelihood, reason = detect(f, gradient)
    if case == "two classes" and (y != -100).sum() == 1 and scale != "mean":
        assert type(likelihood) is Unread  # one number, see below
        return
    assert (type(likelihood), likelihood.class_dim) == (kind, dim)
    assert reason == "read off the output gradient"
    reading = likelihood.read(f, gradient)
    counted = int((y != -100).sum())
    assert reading.predictions == counted
    assert reading.normaliser.item() == pytest.approx(
        (counted if reduction == "mean" else 1) / SCALES[scale], rel=1e-12
    )
    assert reading.misfit < 1e-12


@BATCHES
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 3)])
def test_bernoulli_is_read_exactly(shape: tuple[int, ...], reduction: str, scale: str, B: int) -> None:
    f = torch.randn(B, *shape)
    y = torch.randint(2, f.shape).to(f)
    gradient = output_gradient(f, lambda f: SCALES[scale] * binary_cross_entropy_with_logits(f, y, reduction=reduction))
    likelihood, _ = detect(f, gradient)
    if f.numel() == 1 and scale != "mean":
        assert type(likelihood) is Unread  # one number, see below
        return
    assert type(likelihood) is Bernoulli
    reading = likelihood.read(f, gradient)
    assert reading.predictions == f.numel()
    expected = (f.numel() if reduction == "mean" else 1) / SCALES[scale]
    assert reading.normaliser.item() == pytest.approx(expected, rel=1e-12)


@BATCHES
@pytest.mark.parametrize("shape", [(2,), (5,), (4, 3)])
def test_a_squared_error_is_taken_at_its_mean(shape: tuple[int, ...], B: int) -> None:
    f, y = torch.randn(B, *shape), torch.randn(B, *shape)
    gradient = output_gradient(f, lambda f: mse_loss(f, y))
    likelihood, reason = detect(f, gradient)
    assert type(likelihood) is Gaussian
    assert "assumed" in reason
    reading = likelihood.read(f, gradient)
    assert reading.normaliser == reading.predictions == f.numel()
    assert relative(gradient * reading.normaliser, 2 * (f - y)) < 1e-12


def grey(shape: tuple[int, ...]) -> Tensor:
    """Pixels: a third of them black, some white, grey the others."""
    return (torch.rand(shape) * 1.7 - 0.5).clamp(0, 1)


# The divisor of the summed loss, from the batch size and the number of elements.
REDUCTIONS: dict[str, Callable[[int, int], float]] = {
    "mean": lambda B, n: n,
    "sum": lambda B, n: 1,
    "a sample's sum": lambda B, n: B,
}


@BATCHES
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(40,), (1, 6, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grey_targets_of_a_binary_cross_entropy_are_read(
    dtype: torch.dtype, shape: tuple[int, ...], reduction: str, B: int
) -> None:
    f, y = 2 * torch.randn(B, *shape, dtype=dtype), grey((B, *shape)).to(dtype)
    divisor = REDUCTIONS[reduction](B, f.numel())
    gradient = output_gradient(f, lambda f: binary_cross_entropy_with_logits(f, y, reduction="sum") / divisor)
    likelihood, reason = detect(f, gradient)
    assert type(likelihood) is SoftBernoulli
    assert "soft targets" in reason
    for scale in (1.0, 1024.0):  # once it is known, whatever the loss is multiplied by
        reading = likelihood.read(f, scale * gradient)
        assert reading.misfit == 0
        assert reading.predictions == f.numel()
        assert reading.normaliser.item() == pytest.approx(
            divisor / scale, rel=1e-12 if dtype == torch.float64 else 1e-5
        )


# Not a binary cross-entropy with targets that show its scale: the loss from the output and the pixels, and the output.
NOT_GREY: dict[str, tuple[Loss2, Callable[[Tensor], Tensor]]] = {
    "squared error": (mse_loss, lambda f: f),
    "squared error, summed": (lambda f, y: mse_loss(f, y, reduction="sum"), lambda f: f),
    "squared error from nothing": (mse_loss, torch.zeros_like),
    "squared error of small residuals": (mse_loss, lambda f: 0.01 * f),
    "no target at an end": (lambda f, y: binary_cross_entropy_with_logits(f, 0.1 + 0.8 * y), lambda f: f),
}


@BATCHES
@pytest.mark.parametrize("case", NOT_GREY)
def test_what_only_looks_like_grey_targets_is_a_squared_error(case: str, B: int) -> None:
    loss, output = NOT_GREY[case]
    f, y = output(torch.randn(B, 40)), grey((B, 40))
    assert type(detect(f, output_gradient(f, lambda f: loss(f, y)))[0]) is Gaussian


# Losses that labels cannot be drawn for; all of them leave a gradient that sums to zero over the classes.
SOFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "label smoothing": lambda f, y: cross_entropy(f, y, label_smoothing=0.1),
    "class weights": lambda f, y: cross_entropy(f, y, weight=torch.linspace(0.2, 2, f.shape[1], dtype=f.dtype)),
    "soft targets": lambda f, y: cross_entropy(f, torch.linspace(1, 2, f.numel(), dtype=f.dtype).view_as(f).softmax(1)),
    "hinge": lambda f, y: multi_margin_loss(f, y) if f.ndim == 2 else cross_entropy(f, y, label_smoothing=0.2),
    "two terms": lambda f, y: cross_entropy(f, y) + 0.1 * cross_entropy(f, y.flip(0)),
}


@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 6)], ids=["(B, C)", "(B, C, T)"])
@pytest.mark.parametrize("case", SOFT)
def test_soft_labels_fall_back_visibly(case: str, shape: tuple[int, ...]) -> None:
    """A warning, the empirical Fisher, and N as the mean over rows has it: N p.grad is the summed gradient."""
    model = nn.Sequential(nn.Conv1d(4, 5, 1) if len(shape) == 3 else nn.Linear(4, 5))
    x = torch.randn(shape[0], 4, *shape[2:])
    y = torch.randint(5, (shape[0], *shape[2:]))
    with pytest.warns(GRNGWarning, match="empirical Fisher: the output gradient sums to zero"):
        seen = measure(model, x, lambda f: SOFT[case](f, y))
    assert seen.batch.predictions == seen.batch.normaliser == y.numel()
    per_row = output_gradient(model(x), lambda f: SOFT[case](f, y)) * y.numel()
    rows = per_row.movedim(1, -1).flatten(0, -2)
    assert relative(seen.total("0", "output_sum")[0], rows.T @ rows) < 1e-12
    assert "empirical Fisher instead" in seen.capture.fisher.reason


@pytest.mark.parametrize("scale", ["sum", 3.0])
def test_a_declared_scale_holds_under_the_fallback(scale: str | float) -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 5)), torch.randn(8, 4), torch.randint(5, (8,))
    factor = 8.0 if scale == "sum" else 3.0
    with pytest.warns(GRNGWarning, match="empirical Fisher"):
        plain = measure(model, x, lambda f: cross_entropy(f, y, label_smoothing=0.1))
    with pytest.warns(GRNGWarning, match="empirical Fisher"):
        scaled = measure(model, x, lambda f: factor * cross_entropy(f, y, label_smoothing=0.1), loss_scale=scale)
    assert relative(scaled.total("0", "output_sum"), plain.total("0", "output_sum")) < 1e-12


@pytest.mark.parametrize(
    ("f", "loss"),
    [
        (torch.tensor([[0.3]]), lambda f: mse_loss(f, torch.ones_like(f))),
        (torch.tensor([0.3]), lambda f: mse_loss(f, torch.ones_like(f))),
        (torch.tensor([[0.3, 1.0]]), lambda f: cross_entropy(f, torch.tensor([0]), label_smoothing=0.1)),
        (torch.tensor([[0.3]]), lambda f: 1024 * binary_cross_entropy_with_logits(f, torch.ones_like(f))),
    ],
    ids=["squared error", "squared error (1,)", "smoothed, two classes", "scaled Bernoulli"],
)
def test_a_single_number_is_not_read(f: Tensor, loss: Loss) -> None:
    """One number fits any likelihood at some scale; it is believed only at the scale 1."""
    likelihood, reason = detect(f, output_gradient(f, loss))
    assert type(likelihood) is Unread
    assert "declare" in reason


def test_an_unbatched_output_is_not_taken_for_a_squared_error() -> None:
    f = torch.randn(5)
    likelihood, reason = detect(f, output_gradient(f, lambda f: cross_entropy(f, torch.tensor(2))))
    assert type(likelihood) is Unread
    assert "no batch dimension" in reason


DECLARED_WRONG = [
    ("bernoulli", lambda f, y: cross_entropy(f, y)),
    ("categorical", lambda f, y: mse_loss(f, torch.zeros_like(f))),
    ("categorical", lambda f, y: binary_cross_entropy_with_logits(f, (f > 0).to(f))),
    ("categorical", lambda f, y: cross_entropy(f, y, label_smoothing=0.1)),
    ("bernoulli", lambda f, y: binary_cross_entropy_with_logits(f, torch.full_like(f, 0.3))),
    ("bernoulli", lambda f, y: hinge_embedding_loss(f, torch.ones_like(f)) + 0.1 * f.square().sum()),
]


@pytest.mark.parametrize(("name", "loss"), DECLARED_WRONG)
def test_a_declared_likelihood_that_misfits_warns(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 5)), torch.randn(8, 4), torch.randint(5, (8,))
    with pytest.warns(GRNGWarning, match=f"does not fit the declared likelihood '{name}'"):
        seen = measure(model, x, lambda f: loss(f, y), likelihood=name)
    gradients = output_gradient(model(x), lambda f: loss(f, y)) * seen.batch.normaliser
    assert relative(seen.total("0", "output_sum")[0], gradients.T @ gradients) < 1e-12


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian"])
def test_a_declared_likelihood_that_fits_is_silent(name: str) -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 5)), torch.randn(8, 4), torch.randint(2, (8, 5)).double()
    losses: dict[str, Loss] = {
        "categorical": lambda f: cross_entropy(f, y.argmax(1)),
        "bernoulli": lambda f: binary_cross_entropy_with_logits(f, y),
        "gaussian": lambda f: mse_loss(f, y),
    }
    told, read = (measure(model, x, losses[name], likelihood=l, fisher="exact") for l in (name, "auto"))
    assert told.capture.fisher.reason == "declared"
    assert relative(told.total("0", "output_sum"), read.total("0", "output_sum")) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_soft_targets_with_likelihood_and_scale_declared(reduction: str) -> None:
    """An autoencoder's loss: the Fisher does not depend on the labels, only N has to be told."""
    model, x, y = nn.Sequential(nn.Linear(4, 5)), torch.randn(8, 4), torch.rand(8, 5)
    told = {"likelihood": "bernoulli", "loss_scale": 1.0 if reduction == "mean" else "sum", "fisher": "exact"}
    seen = measure(model, x, lambda f: binary_cross_entropy_with_logits(f, y, reduction=reduction), **told)
    p = model(x).detach().sigmoid()
    assert seen.batch.normaliser == (40 if reduction == "mean" else 1)
    assert relative(seen.total("0", "output_sum")[0], (p * (1 - p)).sum(0).diag()) < 1e-12


@pytest.mark.parametrize(("reduction", "scale"), [("mean", "sum"), ("mean", 2.0), ("sum", 1.0), ("sum", 7.0)])
@pytest.mark.parametrize("likelihood", ["auto", "categorical"])
def test_a_declared_scale_that_the_gradient_contradicts(likelihood: str, reduction: str, scale: str | float) -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 5)), torch.randn(8, 4), torch.randint(5, (8,))
    shown = "1" if reduction == "mean" else "8"
    with pytest.raises(ValueError, match=f"loss_scale must be {shown}, .* but is: {scale!r}"):
        measure(model, x, lambda f: cross_entropy(f, y, reduction=reduction), likelihood=likelihood, loss_scale=scale)


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1.0), ("sum", "sum"), ("sum", 8.0)])
def test_a_declared_scale_that_the_gradient_confirms(reduction: str, scale: str | float) -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 5)), torch.randn(8, 4), torch.randint(5, (8,))
    seen = measure(model, x, lambda f: cross_entropy(f, y, reduction=reduction), loss_scale=scale)
    assert seen.batch.normaliser == (8 if reduction == "mean" else 1)


def test_N_is_remembered_where_a_gradient_hides_it() -> None:
    """Once the likelihood is settled, a gradient that misfits shows so, and the scale read before holds on."""
    model, y = nn.Sequential(nn.Linear(4, 3)), torch.randint(3, (8,))
    attached = Attached(model)
    attached.step(lambda: (1024 * cross_entropy(model(torch.randn(8, 4)), y)).backward())
    seen = attached.step(
        lambda: (1024 * cross_entropy(model(torch.randn(4, 4)), y[:4], label_smoothing=0.1)).backward()
    )
    attached.capture.close()
    assert seen.batch.misfit > 1e-3
    assert seen.batch.normaliser.item() == pytest.approx(4 / 1024, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_outputs_are_read(dtype: torch.dtype) -> None:
    f = torch.randn(64, 10).to(dtype)
    y = torch.randint(10, (64,))
    gradient = output_gradient(f, lambda f: 1024 * cross_entropy(f.float(), y))
    likelihood, _ = detect(f, gradient)
    assert type(likelihood) is Categorical
    assert likelihood.read(f, gradient).normaliser.item() == pytest.approx(64 / 1024, rel=2e-2)


# Drawn labels.


def zeros_loss(f: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(f, f.detach() * 0, reduction="sum")


DRAWN: dict[str, tuple[Likelihood, tuple[int, ...], Loss]] = {
    "categorical": (Categorical(), (3, 4), lambda f: -f.log_softmax(-1)[..., 0].sum()),
    "categorical, positions": (Categorical(), (2, 3, 4), lambda f: -f.log_softmax(-1)[..., 0].sum()),
    "categorical, classes second": (Categorical(1), (2, 4, 3), lambda f: -f.log_softmax(1)[:, 0].sum()),
    "bernoulli": (Bernoulli(), (3, 4), zeros_loss),
    "bernoulli (B,)": (Bernoulli(), (6,), zeros_loss),
    "gaussian": (Gaussian(), (3, 4), lambda f: f.square().sum()),
}


@pytest.mark.parametrize("case", DRAWN)
def test_drawn_gradients_have_mean_zero_and_covariance_S(case: str) -> None:
    """S is the Hessian of the loss by the outputs; over 4000 draws, within five standard errors."""
    likelihood, shape, loss = DRAWN[case]
    f = torch.randn(shape)
    S = hessian(loss)(f).reshape(f.numel(), f.numel())
    generator = torch.Generator().manual_seed(0)
    e = torch.stack([likelihood.sample(f, torch.ones(shape), generator) for _ in range(4000)]).flatten(1)
    assert (e.mean(0).abs() <= 5 * (S.diagonal() / len(e)).sqrt() + 1e-12).all()
    products = e.unsqueeze(2) * e.unsqueeze(1)
    assert ((products.mean(0) - S).abs() <= 5 * products.std(0) / len(e) ** 0.5 + 1e-12).all()


@pytest.mark.parametrize("case", DRAWN)
def test_columns_make_exactly_S(case: str) -> None:
    likelihood, shape, loss = DRAWN[case]
    f = torch.randn(shape)
    columns = torch.stack(list(likelihood.columns(f, torch.ones(shape)))).flatten(1).unflatten(1, (shape[0], -1))
    S = hessian(loss)(f).reshape(f.numel(), f.numel())
    # A column carries all samples at once, which do not interact: S consists of their blocks.
    blocks = torch.einsum("cbi,cbj->bij", columns, columns)
    assert relative(torch.block_diag(*blocks), S) < 1e-12
    assert len(columns) == f[0].numel()


def test_log_probabilities_draw_what_logits_draw() -> None:
    """Through log_softmax, -onehot and -onehot + p are the same gradient; drawn alike, by the same numbers."""
    logits = torch.randn(6, 4, requires_grad=True)
    f = logits.log_softmax(-1)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    e = LogCategorical().sample(f.detach(), torch.ones(6, 4), generators[0])
    through = torch.autograd.grad(f, logits, e)[0]
    assert relative(through, Categorical().sample(logits.detach(), torch.ones(6, 4), generators[1])) < 1e-12


@pytest.mark.parametrize("case", DRAWN)
def test_padding_draws_nothing(case: str) -> None:
    likelihood, shape, _ = DRAWN[case]
    f, gradient = torch.randn(shape), torch.ones(shape)
    gradient[0] = 0
    assert not likelihood.sample(f, gradient, torch.Generator())[0].any()
    assert not torch.stack(list(likelihood.columns(f, gradient)))[:, 0].any()


@pytest.mark.parametrize("case", DRAWN)
def test_a_batch_draws_what_its_micro_batches_draw(case: str) -> None:
    likelihood, shape, _ = DRAWN[case]
    f = torch.randn(8, *shape[1:])
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    whole = likelihood.sample(f, torch.ones_like(f), generators[0])
    parts = [likelihood.sample(part, torch.ones_like(part), generators[1]) for part in f.split([1, 4, 3])]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("engine", ["hooks", "backpack"])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_micro_batches_add_up(fisher: str, engine: str) -> None:
    """Statistics of three backward passes in one step == those of the whole batch, offsets included."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    whole = measure(model, x, lambda f: cross_entropy(f, y), engine, fisher=fisher)
    attached = Attached(model, engine, fisher=fisher)
    model.zero_grad()

    def accumulate() -> None:
        for part in torch.arange(8).split([1, 4, 3]):
            (cross_entropy(model(x[part]), y[part]) * len(part) / 8).backward()

    parts = attached.step(accumulate)
    attached.capture.close()
    assert parts.batch.samples == whole.batch.samples == 8
    assert parts.batch.predictions == whole.batch.predictions
    assert parts.batch.normaliser.item() == pytest.approx(8, rel=1e-12)
    for name in whole.layers:
        for what, args in (("output_sum", ()), ("input_sum", ()), ("squared_gradients", ()), ("columns", (4,))):
            assert relative(parts.total(name, what, *args), whole.total(name, what, *args)) < 1e-12
        assert parts.layers[name].status == "verified"


def test_drawing_leaves_the_users_random_numbers_alone() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    before = torch.get_rng_state()
    measure(model, x, lambda f: cross_entropy(f, y))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("kind", "dim"), CODES, ids=str)
def test_what_was_read_survives_a_checkpoint(kind: type[Likelihood], dim: int) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    first, second = Attached(model), Attached(nn.Sequential(nn.Linear(4, 3)))
    first.capture.fisher.likelihood, first.capture.fisher.decided = kind(dim), True
    device = torch.device("cpu")
    second.capture.fisher.load_state(first.capture.fisher.state(device), device)
    assert type(second.capture.fisher.likelihood) is kind
    assert second.capture.fisher.likelihood.class_dim == dim
    assert second.capture.fisher.decided
    assert torch.equal(
        second.capture.fisher.generator(device).get_state(), first.capture.fisher.generator(device).get_state()
    )
    first.capture.close()
    second.capture.close()


def test_a_gradient_of_zeros_or_without_end_decides_nothing() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    attached = Attached(model)
    for factor in (0.0, float("inf"), float("nan")):
        seen = attached.step(lambda factor=factor: (factor * cross_entropy(model(x), y)).backward())
        assert seen.batch is None
        assert not seen.uses
        model.zero_grad()
    seen = attached.step(lambda: cross_entropy(model(x), y).backward())
    attached.capture.close()
    assert type(seen.capture.fisher.likelihood) is Categorical
    assert seen.layers["0"].status == "verified"


class ItsOwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cross_entropy(self.linear(x), torch.zeros(len(x), dtype=torch.long))


def test_a_model_that_returns_its_loss_gets_the_empirical_fisher() -> None:
    model, x = ItsOwnLoss(), torch.randn(6, 4)
    seen = measure(model, x, lambda loss: loss)
    assert "its outputs are not seen" in seen.capture.fisher.reason
    assert seen.layers["linear"].status == "verified"
    rows = output_gradient(model.linear(x), lambda f: cross_entropy(f, torch.zeros(6, dtype=torch.long)))
    assert relative(seen.total("linear", "output_sum")[0], rows.T @ rows) < 1e-12
