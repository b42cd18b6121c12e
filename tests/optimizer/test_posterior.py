"""The posterior of the filter: what it says of the parameters, draws, predictions, and that it leaves all as it was."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from grng import GRNG, Curvature
from grng.posterior import Prediction
from grng.preconditioners import Kalman

from .cases import Positions, cnn, mlp, relative, stream, train, vector
from .test_kalman import Mixed, mixed_model

COVARIANCES = pytest.mark.parametrize("covariance", ["diag", "kron"])


def trained(covariance: Any = "diag", model: nn.Module | None = None, steps: int = 4, **settings: Any) -> Any:
    """A model with its optimizer after some steps."""
    model = mlp(4, 5, 3) if model is None else model
    optimizer = GRNG(model, "kalman", preconditioner=Kalman(covariance=covariance), **settings)
    train(optimizer, model, stream(steps))
    return model, optimizer


def dense_covariance(optimizer: GRNG, name: str) -> Tensor:
    """Of a Linear layer's weight and bias, out by in."""
    layer = next(layer for layer in optimizer._layers if layer.name == name)
    state = optimizer.state[layer.owner]
    if state["p"].numel():
        return state["p"].flatten().diag()
    return torch.kron(state["P_out"][0], state["P_in"][0])


@COVARIANCES
@pytest.mark.parametrize(("temperature", "data_size"), [(1.0, None), (0.3, None), (1.0, 500.0), (2.0, 500)])
def test_draws(covariance: Any, temperature: float, data_size: float | None) -> None:
    """Draws have the mean, the variance and the covariance that are stated, tempered and for the size of the data."""
    model, optimizer = trained(covariance)
    posterior, options = optimizer.posterior, {"temperature": temperature, "data_size": data_size}
    scale = temperature * (1.0 if data_size is None else posterior.seen / data_size)
    variances = posterior.variance(**options)
    expected = scale * dense_covariance(optimizer, "0")
    found = torch.cat([variances["0.weight"], variances["0.bias"][:, None]], 1).flatten()
    assert relative(found, expected.diagonal()) < 1e-10
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        draw = posterior.sample(generator, **options)
        both = [draw[f"0.{name}"] - p.detach() for name, p in model[0].named_parameters()]
        rows.append(torch.cat([both[0], both[1][:, None]], 1).flatten())
    X = torch.stack(rows)
    assert relative(X.T @ X / len(X), expected) < 0.15
    assert float(X.mean(0).norm()) < 5 * float((expected.trace() / len(X)).sqrt())
    assert torch.equal(posterior.mean["0.weight"], model[0].weight)
    optimizer.close()


def test_draws_are_reproducible() -> None:
    _, optimizer = trained("kron")
    one, two, three = (optimizer.posterior.sample(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["0.weight"], three["0.weight"])
    assert one.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    optimizer.close()


@COVARIANCES
@pytest.mark.parametrize("fails", [False, True])
def test_sampled_gives_back_to_the_bit(covariance: Any, fails: bool) -> None:
    """Inside the model holds the draw; outside its own parameters, after an exception too, and the run is the same."""
    ends = []
    for disturbed in (True, False):
        model, optimizer = trained(covariance)
        before = vector(model)
        if disturbed:
            try:
                with optimizer.posterior.sampled(torch.Generator().manual_seed(3)) as draw:
                    assert torch.equal(draw["0.weight"], model[0].weight)
                    assert not torch.equal(vector(model), before)
                    cross_entropy(model(torch.randn(5, 4).double()), torch.tensor([0, 1, 2, 0, 1])).backward()
                    optimizer.zero_grad()
                    if fails:
                        raise KeyError
            except KeyError:
                assert fails
        assert torch.equal(vector(model), before)
        train(optimizer, model, stream(6)[4:])
        ends.append(vector(model))
        optimizer.close()
    assert torch.equal(*ends)


@COVARIANCES
def test_saved_and_loaded(covariance: Any) -> None:
    """The posterior of a loaded optimizer is the same, to the bit."""
    model, optimizer = trained(covariance)
    other = mlp(4, 5, 3, seed=5)
    other.load_state_dict(model.state_dict())
    loaded = GRNG(other, "kalman", preconditioner=Kalman(covariance=covariance))
    loaded.load_state_dict(optimizer.state_dict())
    x = torch.randn(3, 4).double()
    for one, two in ((optimizer, loaded), (loaded, optimizer)):
        a, b = one.posterior, two.posterior
        assert a.seen == b.seen > 0
        assert torch.equal(a.variance()["2.weight"], b.variance()["2.weight"])
        draws = [p.sample(torch.Generator().manual_seed(1))["0.weight"] for p in (a, b)]
        assert torch.equal(*draws)
        assert torch.equal(a.linearised(x).variance, b.linearised(x).variance)
    optimizer.close()
    loaded.close()


@pytest.mark.parametrize("C", [1, 3, 8])
@pytest.mark.parametrize("kind", ["categorical", "gaussian", "bernoulli"])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_seen(gamma: float, kind: str, C: int) -> None:
    """n_eff: the samples whose information the covariance holds, of however many outputs each."""
    model = mlp(4, max(C, 2) if kind == "categorical" else C)
    loss = {"categorical": cross_entropy, "gaussian": mse_loss, "bernoulli": binary_cross_entropy_with_logits}[kind]
    with GRNG(model, "kalman", preconditioner=Kalman(gamma=gamma)) as optimizer:
        expected = 0.0
        for x, y in stream(5, B=6, C=2):
            optimizer.zero_grad()
            loss(model(x), y if kind == "categorical" else y.to(x).unsqueeze(1).expand(-1, C).contiguous()).backward()
            optimizer.step()
            expected = (1 - gamma) * expected + 6
        assert optimizer.posterior.seen == pytest.approx(expected, rel=1e-12)


def brute_force(model: nn.Module, x: Tensor, covariances: dict[str, Tensor]) -> Tensor:
    """J P J^T per output, with Jacobians of all parameters by torch.func; P by module: weight and bias joined."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    J = jacrev(lambda v: functional_call(model, v, (x,)))(values)
    f = model(x)
    total = torch.zeros_like(f)
    for name, P in covariances.items():
        if name + ".bias" in J:
            rows = torch.cat([J[name + ".weight"].flatten(f.ndim + 1), J[name + ".bias"].unsqueeze(-1)], -1)
        elif name + ".weight" in J:
            rows = (
                J[name + ".weight"].mT if isinstance(model.get_submodule(name), nn.Embedding) else J[name + ".weight"]
            )
        else:
            rows = J[name]
        rows = rows.flatten(f.ndim)
        total = total + torch.einsum("...i,ij,...j->...", rows, P, rows)
    return total.detach()


@COVARIANCES
@pytest.mark.parametrize("n", [1, 4])
def test_linearised_variance(covariance: Any, n: int) -> None:
    """v^T P v with layers of every kind, one of them used twice, and a bare parameter, against dense Jacobians."""
    model = mixed_model()
    generator = torch.Generator().manual_seed(3)
    with GRNG(model, "kalman", preconditioner=Kalman(covariance=covariance)) as optimizer:
        for _ in range(3):
            x, y = torch.rand(6, 4, generator=generator).double() * 2, torch.randint(3, (6,), generator=generator)
            train(optimizer, model, [(x, y)])
        x = torch.rand(n, 4, generator=generator).double() * 2
        dense = {name: dense_covariance(optimizer, name) for name in ("embedding", "conv", "shared", "head", "gain")}
        found = optimizer.posterior.linearised(x, temperature=0.7)
        expected = 0.7 * brute_force(model, x, dense)
        assert relative(found.model_variance, expected) < 1e-10
        f = model(x).detach()
        assert relative(found.mean, torch.softmax(f / (1 + torch.pi / 8 * expected).sqrt(), 1)) < 1e-10


@COVARIANCES
def test_linearised_of_every_position(covariance: Any) -> None:
    """Outputs at several positions of a sample: each its own variance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(6, 3, 4).double(), torch.randn(6, 3, 2).double()
    with GRNG(model, "kalman", preconditioner=Kalman(covariance=covariance)) as optimizer:
        train(optimizer, model, [(x, y)] * 3, mse_loss)
        found = optimizer.posterior.linearised(x[:2])
        dense = {name: dense_covariance(optimizer, name) for name in ("0", "2")}
        assert found.mean.shape == (2, 3, 2)
        assert relative(found.model_variance, brute_force(model, x[:2], dense)) < 1e-10
        assert relative(found.variance, found.model_variance + optimizer.posterior.noise) < 1e-12


@COVARIANCES
def test_predictions_agree(covariance: Any) -> None:
    """Draws and linearisation tell the same of a regression where the posterior is tight, and noise adds up."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 64).double()[:, None]
    y = torch.sin(3 * x) + 0.1 * torch.randn_like(x)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    with GRNG(model, "kalman", preconditioner=Kalman(covariance=covariance, gamma=0.01)) as optimizer:
        train(optimizer, model, [(x, y)] * 200, mse_loss)
        posterior, options = optimizer.posterior, {"temperature": 1e-3}
        linear = posterior.linearised(x, **options)
        drawn = posterior.predict(x, samples=1500, generator=torch.Generator().manual_seed(0), **options)
        assert relative(drawn.mean, linear.mean) < 0.02
        assert relative(drawn.model_variance, linear.model_variance) < 0.2
        assert relative(drawn.variance, drawn.model_variance + posterior.noise) < 1e-10
        assert 0.1**2 / 3 < posterior.noise < 0.1**2 * 3
        log_likelihood = linear.log_likelihood(y).mean()
        normal = torch.distributions.Normal(linear.mean, linear.variance.sqrt())
        assert relative(log_likelihood, normal.log_prob(y).mean()) < 1e-10


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_probabilities(kind: str) -> None:
    """They are probabilities, less sure than the mean's, by draws and by linearisation."""
    torch.manual_seed(0)
    x = torch.randn(40, 4).double()
    model = mlp(4, 6, 3)
    y: Tensor = (x[:, 0] > 0).long() if kind == "categorical" else (x[:, :3] > 0).double()
    loss = cross_entropy if kind == "categorical" else binary_cross_entropy_with_logits
    with GRNG(model, "kalman") as optimizer:
        train(optimizer, model, [(x, y)] * 30, loss)
        at = 3 * torch.randn(20, 4).double()
        logits = model(at).detach()
        sure = logits.softmax(1).amax(1) if kind == "categorical" else torch.maximum(logits, -logits).sigmoid()
        for found in (optimizer.posterior.predict(at, 200), optimizer.posterior.linearised(at)):
            assert bool((found.mean >= 0).all())
            assert bool((found.mean <= 1).all())
            if kind == "categorical":
                assert relative(found.mean.sum(1), torch.ones(20).double()) < 1e-10
                unsure = found.mean.amax(1)
                expected = found.mean.gather(1, torch.zeros(20, 1).long()).log().squeeze(1)
                assert relative(found.log_likelihood(torch.zeros(20).long()), expected) < 1e-10
            else:
                unsure = torch.maximum(found.mean, 1 - found.mean)
            assert float(unsure.mean()) < float(sure.mean())


def test_convolutions_and_batch_norm() -> None:
    """Predictions are made in evaluation mode, and leave running statistics, modes and gradients alone."""
    model = cnn(torch.float64)
    x, y = torch.randn(12, 1, 6, 6).double(), torch.randint(3, (12,))
    with GRNG(model, "kalman", preconditioner=Kalman(covariance="kron")) as optimizer:
        train(optimizer, model, [(x, y)] * 3)
        optimizer.zero_grad()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        found = optimizer.posterior.linearised(x[:2])
        optimizer.posterior.predict(x[:2], samples=3)
        assert found.model_variance.shape == (2, 3)
        assert bool((found.model_variance > 0).all())
        assert all(module.training for module in model.modules())
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_farther_is_less_certain() -> None:
    """The band of a regression widens away from the data."""
    torch.manual_seed(0)
    x = torch.rand(64, 1).double() * 2 - 1
    y = x**2
    for covariance in ("diag", "kron"):
        model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1)).double()
        preconditioner = Kalman(covariance=covariance)  # type: ignore[arg-type]
        with GRNG(model, "kalman", preconditioner=preconditioner) as optimizer:
            train(optimizer, model, [(x, y)] * 100, mse_loss)
            inside, outside = optimizer.posterior.linearised(torch.tensor([[0.0], [4.0]]).double()).model_variance
        assert float(outside) > 3 * float(inside)


def test_refusals() -> None:
    """Errors say what is missing and what to do."""
    _, optimizer = trained()
    posterior = optimizer.posterior
    for name in ("temperature", "data_size"):
        for value in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match=rf"{name} must be .*> 0"):
                posterior.variance(**{name: value})
    for value in (None, float("inf")):
        with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
            posterior.variance(temperature=value)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*predict\(\)"):
        posterior.linearised(torch.randn(2, 4).double())
    with pytest.raises(ValueError, match=r"samples must be a whole number >= 1.*0"):
        posterior.predict(torch.randn(2, 4).double(), samples=0)
    with pytest.raises(RuntimeError, match="no step was made on a squared error"):
        _ = posterior.noise
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = optimizer.posterior
    with GRNG(mlp(4, 3), "ring") as ring, pytest.raises(TypeError, match="keeps no posterior: variant 'kalman' does"):
        _ = ring.posterior
    unaligned = Positions().double()
    x = torch.randn(5, 3, 4).double()
    with GRNG(unaligned, "kalman") as optimizer:
        train(optimizer, unaligned, [(x, torch.randint(3, (5,)))])
        with pytest.raises(TypeError, match=r"'place' does not see the samples one by one: use predict\(\)"):
            optimizer.posterior.linearised(x)
        assert optimizer.posterior.predict(x, samples=2).mean.shape == (5, 3)


def test_before_the_first_step_all_is_certain() -> None:
    """Nothing is covered yet: no variances, draws at the mean."""
    model = Mixed().double()
    with GRNG(model, "kalman", curvature=Curvature(likelihood="categorical")) as optimizer:
        assert optimizer.posterior.variance() == {}
        draw = optimizer.posterior.sample()
        assert all(torch.equal(draw[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("kind", "right", "wrong"), [("gaussian", (5, 2), [(5,), (1, 2)]), ("categorical", (5,), [(1,), (9,)])]
)
def test_targets_of_another_shape_are_refused(kind: str, right: tuple[int, ...], wrong: list[tuple[int, ...]]) -> None:
    """Broadcast, their mean would be no log likelihood."""
    mean = torch.full((5, 2), 0.5)
    found = Prediction(mean, mean, mean, kind)
    dtype = torch.long if kind == "categorical" else torch.float32
    assert found.log_likelihood(torch.zeros(right, dtype=dtype)).shape == right
    for shape in wrong:
        with pytest.raises(ValueError, match=r"y must be of shape \(5,.*but is: "):
            found.log_likelihood(torch.zeros(shape, dtype=dtype))


@COVARIANCES
def test_an_autocast_around_everything_keeps_no_weights(covariance: Any) -> None:
    """It casts every weight once: those of a draw are others, and so are those of a step."""
    model, x = mlp(4, 5, 3, dtype=torch.float32), torch.randn(6, 4)
    optimizer = GRNG(model, "kalman", preconditioner=Kalman(covariance=covariance))
    train(optimizer, model, stream(3, dtype=torch.float32))

    def outputs(outer: bool) -> list[Tensor]:
        found = []
        with torch.autocast("cpu", torch.bfloat16) if outer else nullcontext():

            def look() -> None:
                with torch.autocast("cpu", torch.bfloat16):
                    found.append(model(x))

            look()
            with optimizer.posterior.sampled(torch.Generator().manual_seed(1), temperature=10.0):
                look()
            look()
        return [f.detach() for f in found]

    outer, alone = outputs(True), outputs(False)
    assert all(torch.equal(a, b) for a, b in zip(outer, alone, strict=True))
    assert torch.equal(outer[0], outer[2])
    assert not torch.equal(outer[0], outer[1])
    with torch.autocast("cpu", torch.bfloat16):
        train(optimizer, model, stream(1, dtype=torch.float32))
        cached = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cached, model(x))
    optimizer.close()


class Merging(nn.Linear):
    """Does more in train() than to note the mode, as layers do that merge low-rank weights for evaluation."""

    merged = 0

    def train(self, mode: bool = True) -> "Merging":
        self.merged += int(not mode) - int(not self.training)
        return super().train(mode)


def test_modes_are_restored_by_the_modules_own_train() -> None:
    model = nn.Sequential(Merging(4, 5), nn.Tanh(), nn.Sequential(nn.Dropout(0.5), Merging(5, 3))).double()
    model[2][0].eval()  # frozen by the user
    optimizer = GRNG(model, "kalman")
    train(optimizer, model, stream(2))
    for look in (lambda x: optimizer.posterior.predict(x, samples=2), optimizer.posterior.linearised):
        look(torch.randn(2, 4).double())
        assert [m.training for m in model.modules()] == [True, True, True, True, False, True]
        assert (model[0].merged, model[2][1].merged) == (0, 0)
    optimizer.close()
