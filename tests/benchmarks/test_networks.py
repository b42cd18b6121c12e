"""The networks: their published sizes, that they train, and what is special to each."""

import re
import warnings

import pytest
import torch
from grng.baselines import make_optimizer
from grng.benchmarks.networks.cait import CaiT, ClassAttention, TalkingHeads
from grng.benchmarks.networks.convnext import ConvNeXt, convnext_t
from grng.benchmarks.networks.pyramidnet import PyramidNet
from grng.benchmarks.networks.resnet import PreActivation, WideResNet, resnet18, resnet50
from grng.benchmarks.networks.shake import ShakeDrop, ShakeShake, ShakeShakeNet, TwoWays, shakedrop_pyramidnet
from grng.benchmarks.networks.swin import Swin, WindowAttention, swin_t
from grng.benchmarks.networks.tinyvit import TinyViT, tinyvit_5m
from grng.benchmarks.networks.tinyvit import WindowAttention as DistantAttention
from grng.benchmarks.networks.vgg import vgg16bn
from grng.benchmarks.networks.vit import Attention, ViT, vit_s, vit_ti
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from grng.regularizers import GNP, Regularized

CLASSES = 5

# Counts of torchvision's pages (ResNet and VGG for ImageNet, Swin), of timm (ViT, CaiT), of pytorchcv's tables
# (WRN-28-10, PyramidNet, Shake-Shake), of NeuralFuse's table of CIFAR nets (ResNet-18, VGG-16), of reproductions (the
# rest).
SIZES = {
    "resnet18": (lambda: resnet18(10), 11_173_962),
    "resnet50": (lambda: resnet50(10), 23_520_842),
    "resnet18-large": (lambda: resnet18(1000, large=True), 11_689_512),
    "resnet50-large": (lambda: resnet50(1000, large=True), 25_557_032),
    "wrn16-4": (lambda: WideResNet(16, 4, 10), 2_748_890),
    "wrn28-10": (lambda: WideResNet(28, 10, 10), 36_479_194),
    "vgg16bn": (lambda: vgg16bn(10), 14_728_266),
    "vgg16bn-large": (lambda: vgg16bn(1000, large=True), 138_365_992),
    "pyramidnet110": (lambda: PyramidNet(110, 270, 10), 28_485_477),
    "pyramidnet272": (lambda: PyramidNet(272, 200, 10, bottleneck=True), 26_210_842),
    "shake-shake-32": (lambda: ShakeShakeNet(26, 32, 10), 2_923_162),
    "shakedrop": (lambda: shakedrop_pyramidnet(272, 200, 10), 26_210_842),
    "vit-ti": (lambda: vit_ti(1000, size=224, patch=16), 5_717_416),
    "vit-s": (lambda: vit_s(1000, size=224, patch=16), 22_050_664),
    "swin-t": (lambda: swin_t(1000, size=224, patch=4, window=7), 28_288_354),
    "cait-xxs24": (lambda: CaiT(1000, size=224, patch=16), 11_956_264),
    "convnext-t": (lambda: convnext_t(1000), 28_589_128),
    "tinyvit-5m": (lambda: tinyvit_5m(1000), 5_392_764),
}

# Side of the image, and millions of multiplications and additions for one, of the same pages and tables.
PRODUCTS = {
    "resnet18": (32, 557.1),
    "resnet18-large": (224, 1814),
    "resnet50-large": (224, 4089),
    "wrn28-10": (32, 5247),
    "vgg16bn": (32, 314),
    "vgg16bn-large": (224, 15_470),
    "pyramidnet110": (32, 4731),
    "pyramidnet272": (32, 4541),
    "shake-shake-32": (32, 428.9),
    "convnext-t": (224, 4456),
}

TINY = {
    "resnet18": lambda: resnet18(CLASSES, 4),
    "resnet18-large": lambda: resnet18(CLASSES, 4, large=True),
    "resnet50-large": lambda: resnet50(CLASSES, 4, large=True),
    "wrn": lambda: WideResNet(10, 1, CLASSES),
    "vgg": lambda: vgg16bn(CLASSES, narrower=16),
    "pyramidnet": lambda: PyramidNet(8, 12, CLASSES),
    "pyramidnet-bottleneck": lambda: PyramidNet(11, 12, CLASSES, bottleneck=True),
    "shake-shake": lambda: ShakeShakeNet(8, 8, CLASSES),
    "shakedrop": lambda: shakedrop_pyramidnet(11, 12, CLASSES),
    "vit": lambda: ViT(CLASSES, 16, 2, depth=2, dropout=0.1),
    "swin": lambda: Swin(CLASSES, 8, (2, 2), (2, 4)),
    "cait": lambda: CaiT(CLASSES, 16, 2, depth=2, reading=1),
    "convnext": lambda: ConvNeXt(CLASSES, (8, 16), (1, 1)),
    "tinyvit": lambda: TinyViT(CLASSES, (8, 16, 16), (1, 2, 1), (1, 2, 4), (4, 2, 2)),
}

# Parameters for which no layer has factors.
OTHERS = ("Block", "BatchNorm2d", "LayerNorm", "ViT", "CaiT", "PatchBlock", "ClassBlock", "WindowAttention")


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_a_network_has_its_published_size(name):
    build, published = SIZES[name]
    with torch.device("meta"):
        assert count(build()) == published


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_network_costs_what_was_published(name):
    size, published = PRODUCTS[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        SIZES[name][0]()(torch.empty(1, 3, size, size))
    assert counter.get_total_flops() / 2e6 == pytest.approx(published, rel=0.02)  # some count norms too


def test_tinyvit_costs_its_published_1_3_billion():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        tinyvit_5m(1000)(torch.empty(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e9, 1) == 1.3


def test_shake_shake_of_96_channels_has_its_published_26_2_million():
    with torch.device("meta"):
        assert round(count(ShakeShakeNet(26, 96, 10)) / 1e6, 1) == 26.2


@pytest.mark.parametrize("name", TINY)
def test_a_network_trains_by_ring_and_every_layer_with_factors_is_verified(name):
    torch.manual_seed(0)
    model = TINY[name]()
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % CLASSES
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(), make_optimizer("ring", model) as optimizer:
        warnings.simplefilter("error")
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        rows = list(optimizer.coverage())
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(row.verified == "yes" or row.reason.removeprefix("no factors for ") in OTHERS for row in rows)
    assert model.eval()(x).shape == (4, CLASSES)


@pytest.mark.parametrize("name", TINY)
def test_a_sample_is_classified_the_same_alone_and_among_others(name):
    torch.manual_seed(0)
    model = TINY[name]().eval()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_shake_shake_draws_for_every_sample_and_for_each_direction():
    torch.manual_seed(0)
    first, second = torch.ones(64, 2, 3, 3, requires_grad=True), torch.zeros(64, 2, 3, 3, requires_grad=True)
    mixed = ShakeShake()(first, second)
    mixed.sum().backward()
    forward, backward = mixed.detach()[:, 0, 0, 0], first.grad[:, 0, 0, 0]
    assert torch.equal(mixed.detach(), forward.view(-1, 1, 1, 1).expand_as(mixed))
    torch.testing.assert_close(first.grad + second.grad, torch.ones_like(first))
    for drawn in (forward, backward):
        assert 0 <= drawn.min() < 0.1 < 0.9 < drawn.max() <= 1
        assert len(drawn.unique()) == 64
    assert torch.corrcoef(torch.stack([forward, backward]))[0, 1].abs() < 0.3


@pytest.mark.parametrize("module", [ShakeShake, lambda: ShakeDrop(0.4)], ids=["Shake-Shake", "ShakeDrop"])
@pytest.mark.parametrize("size", [1, 64])
def test_the_true_gradient_is_that_of_what_was_computed(module, size):
    """And takes as many random numbers, so that GNP's passes go through one function."""
    module = module()
    inputs = [torch.randn(size, 2, 3, 3, requires_grad=True) for _ in range(1 + isinstance(module, ShakeShake))]
    found = []
    for module.true_gradient in (False, True):
        torch.manual_seed(0)
        y = module(*inputs)
        found.append((y.detach(), torch.autograd.grad(y.sum(), inputs[0])[0], torch.rand(())))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2])
    y, gradient, _ = found[1]
    expected = sum(g * x.detach() for g, x in zip(gradients(module, inputs), inputs, strict=True))
    torch.testing.assert_close(expected, y, rtol=1e-4, atol=1e-5)
    if size > 1:
        assert not torch.equal(gradient, found[0][1])


def gradients(module, inputs):
    torch.manual_seed(0)
    return torch.autograd.grad(module(*inputs).sum(), inputs)


def test_gnp_goes_along_the_true_gradient_of_a_shaken_net():
    """Its first pass alone; the switch is put back, also after an exception."""
    model, seen = TINY["shake-shake"](), []
    shaken = [m for m in model.modules() if isinstance(m, ShakeShake)]
    optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=0.01), GNP(0.1, alpha=0.8), model=model)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(CLASSES, (4,))

    def closure():
        optimizer.zero_grad()
        seen.append({m.true_gradient for m in shaken})
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if len(seen) == 3:
            raise KeyboardInterrupt
        return loss

    optimizer.step(closure)
    assert seen == [{True}, {False}]
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert not any(m.true_gradient for m in shaken)


def test_shake_shake_in_evaluation_is_the_mean():
    first, second = torch.randn(2, 4, 3, 5, 5)
    torch.testing.assert_close(ShakeShake().eval()(first, second), (first + second) / 2)


def test_shakedrop_keeps_or_disturbs_and_in_evaluation_is_its_expectation():
    torch.manual_seed(0)
    drop, x = ShakeDrop(0.6), torch.ones(20_000, 1, requires_grad=True)
    y = drop(x)
    y.sum().backward()
    forward, backward = y.detach().flatten(), x.grad.flatten()
    kept = forward == 1
    assert kept.float().mean() == pytest.approx(0.6, abs=0.02)
    assert (backward[kept] == 1).all()
    assert -1 <= forward.min() < -0.9
    assert 0 <= backward.min() < 0.1
    assert backward[~kept].mean() == pytest.approx(0.5, abs=0.02)
    assert forward.mean() == pytest.approx(drop.eval()(x).mean().item(), abs=0.02)


def test_a_graph_of_random_coefficients_is_the_same_when_it_is_walked_again():
    torch.manual_seed(0)
    model = TINY["shakedrop"]()
    loss = model(torch.randn(4, 3, 32, 32)).square().sum()
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_shakedrop_keeps_less_the_deeper_a_block_lies():
    with torch.device("meta"):
        kept = [m.keep for m in shakedrop_pyramidnet(272, 200, 10).modules() if isinstance(m, ShakeDrop)]
    assert len(kept) == 90
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == pytest.approx((1 - 0.5 / 90, 0.5))


def test_a_wide_block_projects_what_its_first_convolution_sees():
    block = PreActivation(2, 4, 2).eval()
    nn.init.zeros_(block.body[-1].weight)
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(x.relu()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0, 2])
def test_attention_stays_inside_its_window(shift):
    """A place is changed only by those of its window, and windows that are shifted do not reach around the edge."""
    torch.manual_seed(0)
    attention = WindowAttention(4, 2, size=8, side=4, shift=shift)
    x = torch.randn(1, 8, 8, 4)
    changed = x.clone()
    changed[0, 0, 0] += 1
    moved = (attention(changed) - attention(x)).abs().sum((0, 3)) > 1e-7
    window = torch.zeros(8, 8, dtype=torch.bool)
    edge = 2 if shift else 4
    window[:edge, :edge] = True
    assert torch.equal(moved, window)


def test_heads_that_do_not_talk_are_plain_attention():
    torch.manual_seed(0)
    talking, plain, x = TalkingHeads(8, 2), Attention(8, 2, 0.0), torch.randn(3, 5, 8)
    for layer in (talking.before, talking.after):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    plain.load_state_dict(talking.state_dict(), strict=False)
    torch.testing.assert_close(talking(x), plain(x))
    nn.init.constant_(talking.after.weight, 0.5)
    assert not torch.allclose(talking(x), plain(x))


def test_class_attention_is_the_first_token_of_plain_attention():
    torch.manual_seed(0)
    asking, plain, x = ClassAttention(8, 2), Attention(8, 2, 0.0), torch.randn(3, 5, 8)
    plain.load_state_dict(asking.state_dict())
    torch.testing.assert_close(asking(x), plain(x)[:, :1])


def test_the_two_ways_of_shake_shake_see_different_pixels():
    ways, x = TwoWays(1, 2, 2).eval(), torch.arange(1.0, 17).view(1, 1, 4, 4)
    for way in ways.ways:
        nn.init.ones_(way.weight)
    even, odd = [[1, 3], [9, 11]], [[6, 8], [14, 16]]
    torch.testing.assert_close(ways(x)[0], torch.tensor([even, odd]).float(), rtol=1e-4, atol=0)


def test_swin_equals_the_one_of_transformers():
    transformers = pytest.importorskip("transformers")
    settings = {"depths": [2, 2, 2], "num_heads": [2, 4, 4], "window_size": 4, "num_labels": CLASSES}
    config = transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=8, **settings)
    check_equal(transformers.SwinForImageClassification(config), Swin(CLASSES, 8, (2, 2, 2), (2, 4, 4)))


def test_vit_equals_the_one_of_transformers():
    transformers = pytest.importorskip("transformers")
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": CLASSES}
    config = transformers.ViTConfig(image_size=32, patch_size=4, hidden_size=16, layer_norm_eps=1e-6, **settings)
    check_equal(transformers.ViTForImageClassification(config), ViT(CLASSES, 16, 2, depth=2))


def test_convnext_equals_the_one_of_transformers():
    transformers = pytest.importorskip("transformers")
    settings = {"depths": [2, 1], "num_stages": 2, "hidden_sizes": [8, 12], "num_labels": CLASSES}
    config = transformers.ConvNextConfig(image_size=32, **settings)
    parts = {
        "patch_embeddings": r"embed\.",
        r"embeddings\.layernorm": r"first\.",
        r"downsampling_layer\.0": r"^stages\.2\.norm",
        r"downsampling_layer\.1": r"reduce\.",
        "dwconv": "depthwise",
        r"layers\.\d\.layernorm": r"^stages\.[013]\.norm",
        "pwconv1": r"feed\.0",
        "pwconv2": r"feed\.2",
        "layer_scale": "scale",
        r"convnext\.layernorm": r"^norm",
        "classifier": r"head\.",
    }
    check_equal(transformers.ConvNextForImageClassification(config), ConvNeXt(CLASSES, (8, 12), (2, 1)), parts)


def test_a_bias_of_tinyvit_goes_by_the_distance_of_two_places_in_either_direction():
    attention = DistantAttention(4, 2, side=3)
    with torch.no_grad():
        attention.bias.copy_(torch.arange(18.0).view(2, 9))
    bias = attention.bias[:, attention.distances]
    for a, b in ((0, 4), (4, 0), (8, 4), (2, 4), (1, 3)):
        assert bias[:, a, b].tolist() == [4, 13]  # a row and a column apart
    assert bias[0, 0, 6] == 6
    assert bias[0].diagonal().tolist() == [0] * 9


# Patterns of the same parameters' names, in order of appearance the same.
PARTS = {
    r"projection\.": r"embed\.",
    r"embeddings\.norm\.": r"first\.",
    r"q_proj\.": r"\.q\.",
    r"k_proj\.": r"\.k\.",
    r"v_proj\.": r"\.v\.",
    r"o_proj\.": r"\.out\.",
    r"bias_table": r"attention\.bias",
    r"layernorm_before\.": r"norm1\.",
    r"layernorm_after\.": r"norm2\.",
    r"fc1\.": r"feed\.0\.",
    r"fc2\.": r"feed\.2\.",
    "downsample.reduction": r"\.reduce\.",
    "downsample.norm": r"\d\.norm\.",
    r"\.layernorm\.": r"^norm\.",
    r"cls_token": r"^token",
    r"position_embeddings": r"^position",
    r"classifier\.": r"head\.",
}


@torch.no_grad()
def check_equal(theirs: nn.Module, mine: nn.Module, parts: dict[str, str] = PARTS) -> None:
    """The same weights give the same outputs."""
    torch.manual_seed(0)
    copied = 0
    for pattern, own in parts.items():
        for p, q in zip(matching(theirs, pattern), matching(mine, own), strict=True):
            p.copy_(0.3 * torch.randn_like(p))
            if pattern.startswith("downsample"):  # neighbours by columns, here by rows
                q.copy_(torch.cat([p.chunk(4, -1)[i] for i in (0, 2, 1, 3)], -1))
            else:
                q.copy_(p.T if pattern == "bias_table" else p)
            copied += p.numel()
    assert copied == count(mine)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x).logits, rtol=1e-4, atol=1e-5)


def matching(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if re.search(pattern, name)]
