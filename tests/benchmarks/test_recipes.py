"""Every committed recipe is one that `grng compare` or `grng bench` reads, and its optimizers are built and step."""

from pathlib import Path

import pytest
import torch
from grng.baselines import make_optimizer
from grng.benchmarks import CompareConfig
from grng.benchmarks.bench import DEFAULT_OPTIMIZERS, Job, workloads_of
from grng.benchmarks.bench.recipes import read_bench_recipe
from grng.benchmarks.bench.roster import contestant_of
from grng.benchmarks.bench.trial import at_length
from grng.benchmarks.config import read_recipe
from grng.benchmarks.loop import Stepper, closing
from grng.benchmarks.models import build_model
from grng.benchmarks.names import optimizer_of
from grng.benchmarks.runner import completed

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
BENCH = sorted((Path(__file__).parents[2] / "recipes" / "bench").glob("*.toml"))
RUNS = [
    pytest.param(recipe, name, id=f"{recipe.stem}:{name}")
    for recipe in RECIPES
    if not recipe.stem.endswith("-tune")
    for name in CompareConfig(**read_recipe(recipe)).names
]


def test_there_are_recipes():
    assert {"regularizers-digits", "regularizers-fashion", "regularizers-cost"} <= {r.stem for r in RECIPES}
    known = {"gnp-cifar10", "gnp-shake", "gnp-shakedrop", "gnp-imagenet", "gnp-vit-cifar10"}
    known |= {"agr-cifar100", "agr-ddpm", "agr-albert", "agr-tinyimagenet", "agr-tinyvit", "agr-convnext"}
    known |= {"gnp-vit-mixup"}
    assert known | {
        "grng-glue",
        "grng-cifar10",
        "deepobs-fmnist",
        "deepobs-cifar10",
        "deepobs-cifar10-ours",
        "deepobs-fmnist-ours",
        "deepobs-cost",
        "deepobs-cifar10-muon",
        "mnist1d",
        "mnist1d-decay",
        "mnist1d-gru",
        "fast",
        "fast-value",
        "full",
    } == {r.stem for r in BENCH}


@pytest.mark.parametrize(("recipe", "name"), RUNS)
def test_every_run_of_a_recipe_trains(recipe, name):
    config = CompareConfig(**read_recipe(recipe))
    model = build_model(config.model, (1, 8, 8), 10)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    before = [p.detach().clone() for p in model.parameters()]
    with closing(make_optimizer(optimizer_of(name), model, **completed(config.given(name), 10))) as optimizer:
        loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
        step = Stepper(model, optimizer, loss)
        losses = [step((x, y)) for _ in range(3)]
    assert all(loss.isfinite() for loss in losses)
    assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem.endswith("-tune")], ids=lambda r: r.stem)
def test_tuning_is_equal(recipe):
    """Every method gets the same number of trials, on held-out data, and the comparison runs just these methods."""
    config = CompareConfig(**read_recipe(recipe))
    assert config.validation
    assert len({len(points) for points in config.points.values()}) == 1
    scored = CompareConfig(**read_recipe(recipe.with_stem(recipe.stem.removesuffix("-tune"))))
    assert set(scored.names) == set(config.grid)
    shared = ("data", "model", "epochs", "batch_size", "lr_schedule")
    assert scored.seeds >= 5
    assert [getattr(scored, key) for key in shared] == [getattr(config, key) for key in shared]
    for name, points in config.points.items():
        assert scored.given(name) in [config.given(point) for point in points]


@pytest.mark.parametrize("recipe", BENCH, ids=lambda r: r.stem)
def test_every_recipe_of_the_bench_is_one(recipe, tmp_path):
    """It makes a job, every workload in it is known, and every optimizer makes steps with its settings."""
    options = read_bench_recipe(recipe)
    options = {key: value for key, value in options.items() if key not in ("studies", "trials", "seeds", "device")}
    workloads = workloads_of(options.pop("tier", None), options.pop("workloads", []))
    job = Job(workloads, options.pop("optimizers", DEFAULT_OPTIMIZERS), tmp_path, device="cpu", **options)
    assert job.known
    for name in job.settings:
        model, x, y = torch.nn.Linear(6, 3), torch.randn(8, 6), torch.randint(3, (8,))
        settings, horizon = job.best([], workloads[0], contestant_of(name))
        assert horizon == 1
        with closing(make_optimizer(optimizer_of(name), model, **at_length(settings, 100))) as optimizer:
            loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
            step = Stepper(model, optimizer, loss)
            assert all(step((x, y)).isfinite() for _ in range(3))
