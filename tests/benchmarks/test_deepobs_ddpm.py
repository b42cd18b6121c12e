"""The workloads of DeepOBS, diffusion, and classifiers by name."""

import colorsys
import lzma
import math
import sys
import types
from itertools import islice

import numpy as np
import pytest
import torch
from grng.baselines import make_optimizer
from grng.benchmarks import InputError
from grng.benchmarks.workloads import all_workloads, ddpm, deepobs, find_workload
from grng.benchmarks.workloads.named import named_workload
from torch import nn
from torch.nn import functional as F

CPU = torch.device("cpu")
SAMPLES = {"train": 200, "test": 30}


def make_arrays(shape, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {f"x_{part}": rng.integers(0, 256, (n, *shape), np.uint8) for part, n in SAMPLES.items()}
    return arrays | {f"y_{part}": (np.arange(n) % 10).astype(np.uint8) for part, n in SAMPLES.items()}


@pytest.fixture
def root(tmp_path):
    """Data sets of random images."""
    for name, shape in (("fashion_mnist", (28, 28)), ("cifar10", (32, 32, 3))):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / f"{name}.npz", **make_arrays(shape))
    return tmp_path


def count(model):
    return sum(p.numel() for p in model.parameters())


def ring_step(task, batch):
    """Make a step of ring on a batch."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = make_optimizer("ring", model)
    task.loss(model, batch).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.close()


# The nets of DeepOBS.


def test_parameter_counts():
    """As the layers of the published code come to, and as published for the diffusion model (35.7 million)."""
    assert count(deepobs.net_2c2d()) == 832 + 51_264 + 3_212_288 + 10_250 == 3_274_634
    assert count(deepobs.net_3c3d()) == 4_864 + 55_392 + 110_720 + 590_336 + 131_328 + 2_570 == 895_210
    with torch.device("meta"):
        assert count(ddpm.unet(3, (128, 256, 256, 256))) == 35_746_307


def test_sizes_of_the_layers():
    def sides(model, x):
        found = []
        for layer in model:
            x = layer(x)
            if x.ndim == 4 and not isinstance(layer, nn.ReLU):
                found.append(x.shape[-1])
        return found

    assert sides(deepobs.net_2c2d(), torch.zeros(1, 1, 28, 28)) == [28, 14, 14, 7]
    assert sides(deepobs.net_3c3d(), torch.zeros(1, 3, 32, 32)) == [28, 14, 12, 6, 6, 3]


def test_pooling_pads_at_the_far_end():
    x = torch.randn(2, 3, 28, 28)
    expected = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2)
    assert torch.equal(deepobs.net_3c3d()[2](x), expected)


def test_initial_weights():
    torch.manual_seed(0)
    small, large = deepobs.net_2c2d(), deepobs.net_3c3d()
    for p in small.parameters():
        if p.ndim == 1:
            assert (p == 0.05).all()
        else:
            assert p.abs().max() <= 0.1
    assert small[7].weight.std().item() == pytest.approx(0.05 * 0.87962566, rel=1e-2)
    for p in large.parameters():
        if p.ndim == 1:
            assert not p.any()
    fans = 9 * 64 + 9 * 96
    assert large[3].weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=2e-2)
    assert large[3].weight.abs().max() <= 2 * (2 / fans) ** 0.5 / 0.87962566
    assert large[10].weight.abs().max().item() == pytest.approx((6 / (1152 + 512)) ** 0.5, rel=1e-3)


def test_the_l2_term(root):
    task = deepobs.load_cifar10(root, CPU)
    model, batch = task.model(), next(task.batches(0))
    weights = [module.weight for module in model if isinstance(module, nn.Conv2d | nn.Linear)]
    expected = 0.002 * sum(float((w.detach().double() ** 2).sum()) for w in weights) / 2
    plain = F.cross_entropy(model(batch[0]), batch[1]).item()
    assert task.loss(model, batch).item() - plain == pytest.approx(expected, rel=1e-4)
    x, y = task.splits["test"]
    assert task.evaluate(model, "test")["loss"] - F.cross_entropy(model(x), y).item() == pytest.approx(expected, 1e-4)

    task = deepobs.load_fmnist(root, CPU)
    model, batch = task.model(), next(task.batches(0))
    assert task.loss(model, batch).item() == F.cross_entropy(model(batch[0]), batch[1]).item()


def test_what_is_trained_and_scored(root):
    """The whole training set, and the test set in both roles; grey values of 0 to 1, colours standardised."""
    fashion, cifar = deepobs.load_fmnist(root, CPU), deepobs.load_cifar10(root, CPU)
    for task in (fashion, cifar):
        assert [len(task.splits[name][0]) for name in ("train", "validation", "test")] == [200, 30, 30]
        assert torch.equal(task.splits["validation"][0], task.splits["test"][0])
    assert (fashion.splits["train"][0].min(), fashion.splits["train"][0].max()) == (0, 1)
    assert torch.allclose(cifar.splits["test"][0].mean((1, 2, 3)), torch.zeros(30), atol=1e-6)
    assert cifar.fingerprint.startswith("exact-")


def test_augmentation():
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    x = deepobs.augment(images)
    assert x.shape == images.shape
    assert torch.allclose(x.mean((1, 2, 3)), torch.zeros(64), atol=1e-5)
    assert torch.allclose(x.std((1, 2, 3), correction=0), torch.ones(64), atol=1e-4)
    assert x.abs().max() < 10
    assert (deepobs.augment(torch.full((2, 3, 32, 32), 7, dtype=torch.uint8))).isfinite().all()


def test_an_image_of_one_colour_is_not_blown_up():
    assert not deepobs.standardised(torch.full((1, 3, 32, 32), 7.0)).any()


def test_saturation():
    """As through HSV, with the saturation clipped."""
    torch.manual_seed(0)
    x, factor = 255 * torch.rand(50, 3, 1, 1, dtype=torch.float64), 0.5 + torch.rand(50, 1, 1, 1, dtype=torch.float64)
    got = deepobs.saturated(x, factor)
    for before, c, after in zip(x.view(50, 3), factor.flatten().tolist(), got.view(50, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before.tolist())
        assert after.tolist() == pytest.approx(colorsys.hsv_to_rgb(h, min(1, c * s), v))
    black = torch.full((1, 3, 1, 1), -0.2)
    assert torch.equal(deepobs.saturated(black, torch.ones(1, 1, 1, 1)), black)


@pytest.mark.parametrize("load", [deepobs.load_cifar10, ddpm.load_cifar10])
def test_the_same_seed_makes_the_same_batches(root, load):
    task = load(root, CPU)

    def batches(seed):
        torch.manual_seed(seed)
        return [tensor for batch in islice(task.batches(seed), 2) for tensor in batch]

    assert all(torch.equal(a, b) for a, b in zip(batches(1), batches(1), strict=True))
    assert not torch.equal(batches(1)[0], batches(2)[0])


@pytest.mark.parametrize(("load", "same"), [(deepobs.load_fmnist, True), (deepobs.load_cifar10, False)])
def test_batches_of_the_epochs(root, load, same):
    """200 samples are one batch of 128 an epoch, told by the labels, as CIFAR's images are changed each time."""
    task = load(root, CPU)
    task.splits["train"] = (task.splits["train"][0], torch.arange(200))
    first, second, third = (batch[1] for batch in islice(task.batches(0), 3))
    assert torch.equal(first, second) == same
    assert torch.equal(first, third) == same


@pytest.mark.parametrize("samples", [5, 40, 999, 1000])
@pytest.mark.parametrize("order", [deepobs.repeated, deepobs.by_files])
def test_an_order_is_a_permutation(order, samples):
    assert order(samples, 3, 1).sort().values.tolist() == list(range(samples))
    assert torch.equal(order(samples, 3, 1), order(samples, 3, 1))
    assert not torch.equal(order(1000, 3, 1), order(1000, 4, 1))


def test_a_sample_is_drawn_from_the_buffer():
    """The n-th drawn is one of the first n + size of the stream, any of those that are left alike."""
    order = deepobs.drawn(1000, 0, size=100)
    assert (order - torch.arange(1000)).max() == 99
    late = order.argsort() - torch.arange(1000)  # it enters 99 draws early and waits for a hundred in the mean
    assert late[100:800].float().mean().item() == pytest.approx(0, abs=12)
    whole = torch.stack([deepobs.drawn(4, seed, size=4) for seed in range(4000)])
    counts = torch.unique(whole, dim=0, return_counts=True)[1]
    assert counts.tolist() == pytest.approx([4000 / 24] * 24, abs=5 * (4000 / 24) ** 0.5)


def test_files_stay_together():
    """Of an order by files: each sample has the place that its like in another file has in another epoch."""
    first, second = (deepobs.by_files(100, 0, epoch) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first % 20, second % 20)
    pairs = {(a, b) for a, b in zip((first // 20).tolist(), (second // 20).tolist(), strict=True)}
    assert len(pairs) == 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("load", [deepobs.load_fmnist, deepobs.load_cifar10])
def test_a_step_of_ring(root, load):
    task = load(root, CPU)
    x, y = next(task.batches(0))
    ring_step(task, (x[:16], y[:16]))


# The published curves.


def write_baselines(folder):
    """Two seeds of SGD that were chosen, one that was not, and a problem without accuracies."""
    folder.mkdir()
    (folder / "epochs_to_target.csv").write_text(
        "problem,target,optimizer,learning_rate,n_reached,n_seeds,median_epoch,min_epoch,max_epoch\n"
        "fmnist_2c2d,0.919809,Momentum,0.1,1,2,1.0,1,1\n"
        "mnist_vae,73.5,Adam,0.1,1,2,1.0,1,1\n"
    )
    (folder / "runs.csv").write_text(
        "run,problem,optimizer,learning_rate,momentum,seed\n"
        "0,fmnist_2c2d,Momentum,0.1,0.99,42\n"
        "1,fmnist_2c2d,Momentum,0.1,0.99,43\n"
        "2,fmnist_2c2d,Momentum,1,0.99,42\n"
        "3,mnist_vae,Adam,0.1,,42\n"
    )
    with lzma.open(folder / "curves.csv.xz", "wt") as file:
        file.write("run,epoch,test_acc\n0,0,0.1\n0,1,0.92\n1,0,0.3\n1,1,0.90\n2,0,0.1\n2,1,nan\n3,0,\n3,1,\n")


def test_published_curves(tmp_path):
    write_baselines(tmp_path / "results_deepobs")
    found = deepobs.published(tmp_path)
    assert found.keys() == {"fmnist_2c2d"}
    assert found["fmnist_2c2d"]["target"] == pytest.approx(deepobs.TARGETS["fmnist_2c2d"], abs=1e-4)
    curves = found["fmnist_2c2d"]["optimizers"]["momentum"]
    assert {key: curves[key] for key in ("learning_rate", "momentum", "median_epochs", "reached", "seeds")} == {
        "learning_rate": 0.1,
        "momentum": 0.99,
        "median_epochs": 1.0,
        "reached": 1,
        "seeds": 2,
    }
    assert (curves["first"], curves["last"]) == (1.0, 1.0)
    assert curves["lowest"] == pytest.approx([0.1, 0.90])
    assert curves["median"] == pytest.approx([0.2, 0.91])
    assert curves["highest"] == pytest.approx([0.3, 0.92])


@pytest.mark.parametrize("damaged", ["runs.csv", "curves.csv.xz"])
def test_curves_that_cannot_be_read(tmp_path, damaged):
    write_baselines(tmp_path / "results_deepobs")
    (tmp_path / "results_deepobs" / damaged).write_text("run\n0\n")
    with pytest.raises(InputError, match="does not hold DeepOBS's baselines"):
        deepobs.published(tmp_path)
    with pytest.raises(InputError, match="--data"):
        deepobs.published(None)


# Diffusion.


@pytest.fixture
def diffusion():
    arrays = {key: torch.tensor(value) for key, value in make_arrays((1, 32, 32)).items()}
    images = {key: value if key[0] == "x" else value.long() for key, value in arrays.items()}
    task = ddpm.Diffusion(images, (8, 8, 8), True, "", CPU)
    task.drawn, task.part, task.steps = 12, 8, 2  # on this one alone
    return task


def test_noise_is_added_as_by_the_scheduler(diffusion):
    from diffusers import DDPMScheduler

    x, noise = torch.randn(2, 6, 1, 32, 32)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    assert torch.allclose(diffusion.noised(x, t, noise), DDPMScheduler().add_noise(x, noise, t), atol=1e-6)


def test_batches_of_diffusion(diffusion):
    torch.manual_seed(0)
    x, t, noise = next(diffusion.batches(0))
    assert x.shape == noise.shape == (128, 1, 32, 32)
    assert t.min() >= 0
    assert t.max() < 1000
    signal = diffusion.signal[t].view(-1, 1, 1, 1)
    clean = (x - (1 - signal).sqrt() * noise) / signal.sqrt()
    early = t < 300
    assert clean[early].abs().max() <= 1 + 1e-3


def test_evaluation_of_diffusion_is_repeatable(diffusion):
    model = diffusion.model()
    first = diffusion.evaluate(model, "test")
    torch.manual_seed(5)
    assert diffusion.evaluate(model, "test") == first
    x, t, noise = diffusion.scored["test"]
    assert first["loss"] == pytest.approx(F.mse_loss(model(x, t).sample, noise).item(), rel=1e-5)
    assert model.training


def test_final_distance(diffusion):
    state = torch.get_rng_state()
    model = diffusion.model()
    torch.set_rng_state(state)
    found = diffusion.final(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == diffusion.final(model)
    assert 0 < found["classifier frechet distance"] < math.inf
    assert model.training


def test_a_step_of_ring_on_the_diffusion_model(diffusion):
    ring_step(diffusion, tuple(tensor[:4] for tensor in next(diffusion.batches(0))))


def test_fashion_mnist_for_diffusion(root):
    task = ddpm.load_fashion(root, CPU)
    assert task.x.shape == (180, 1, 32, 32)
    assert not task.x[:, :, :2].any()
    assert count(task.model()) == 1_623_169
    np.savez(root / "fashion_mnist" / "fashion_mnist.npz", **make_arrays((8, 8)))
    with pytest.raises(InputError, match="28"):
        ddpm.load_fashion(root, CPU)


def white(n, d, seed):
    """Features whose sample mean is 0 and whose sample covariance is 1."""
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5


def test_frechet_of_known_moments():
    means, scales = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]), torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.1, 0.5]])
    a, b = (white(n, 3, seed) * s + m for n, seed, s, m in zip((40, 60), (0, 1), scales, means, strict=True))
    expected = (means[0] - means[1]).square().sum() + (scales[0] - scales[1]).square().sum()
    assert ddpm.frechet(a, b) == pytest.approx(expected.item(), rel=1e-6)
    assert ddpm.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    from scipy.linalg import sqrtm

    mixing = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    a, b = white(50, 4, 0) @ mixing[0], white(50, 4, 1) @ mixing[1]
    ca, cb = (m.T @ m for m in mixing)
    cross = np.trace(sqrtm((ca @ cb).numpy()).real)
    assert ddpm.frechet(a, b) == pytest.approx((ca.trace() + cb.trace()).item() - 2 * cross, rel=1e-8)
    assert ddpm.frechet(a, b) == pytest.approx(ddpm.frechet(b, a), rel=1e-8)


# Classifiers by name.


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for the package, which needs torchvision."""
    module = types.ModuleType("timm")

    def create_model(name, pretrained, num_classes, in_chans):
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        assert not pretrained
        return nn.Sequential(nn.Conv2d(in_chans, 4, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


def test_a_model_of_timm(root, timm):
    workload = find_workload("timm:tiny")
    assert (workload.metric, workload.tier, workload.needs) == ("accuracy", "full", ("timm",))
    task = workload.load(root, CPU)
    assert [len(task.splits[part][0]) for part in ("train", "validation", "test")] == [180, 20, 30]
    ring_step(task, next(task.batches(0)))
    assert task.evaluate(task.model(), "test").keys() == {"loss", "accuracy", "brier"}
    with pytest.raises(InputError, match="Unknown model"):
        find_workload("timm:other").load(root, CPU)


def test_a_model_of_transformers(root):
    from transformers import ViTConfig

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for size in (32, 64):
        ViTConfig(image_size=size, patch_size=8, **small).save_pretrained(root / f"vit{size}")
    task = find_workload(f"transformers:{root / 'vit32'}").load(root, CPU)
    assert task.model()(task.splits["test"][0]).shape == (30, 10)
    x, y = next(task.batches(0))
    ring_step(task, (x[:8], y[:8]))
    with pytest.raises(InputError, match="no images of 32 pixels"):
        find_workload(f"transformers:{root / 'vit64'}").load(root, CPU)
    with pytest.raises(InputError, match="no-such-type"):
        find_workload("transformers:no-such-type").load(root, CPU)


def test_a_type_of_transformers_is_fitted_to_the_images():
    from grng.benchmarks.workloads.named import config_of

    config = config_of("vit", num_labels=7)
    assert (config.image_size, config.patch_size, config.num_labels) == (32, 4, 7)


def test_names_without_a_model(root, monkeypatch):
    for name in ("timm:", "torchvision:resnet18"):
        with pytest.raises(InputError, match="timm:NAME"):
            named_workload(name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        named_workload("timm:resnet18").load(root, CPU)


def test_the_workloads_are_listed():
    found = all_workloads()
    for name in ("deepobs-fmnist-2c2d", "deepobs-cifar10-3c3d", "ddpm-fashion", "ddpm-cifar10"):
        assert found[name].tier == "full"
    assert (found["deepobs-fmnist-2c2d"].steps, found["deepobs-fmnist-2c2d"].evaluate_every) == (46_800, 468)
    assert (found["deepobs-cifar10-3c3d"].steps, found["deepobs-cifar10-3c3d"].schedule) == (39_000, "constant")
