"""CIFAR in the formats in which it is kept, and image folders, small and made up."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from grng.baselines import make_optimizer
from grng.benchmarks.errors import InputError
from grng.benchmarks.networks.vit import ViT
from grng.benchmarks.workloads import all_workloads, cifar10, find_workload, image_folder
from grng.benchmarks.workloads.augmentation import mixed_up
from PIL import Image
from torch import nn

from grng.errors import GRNGWarning

CPU = torch.device("cpu")
SAMPLES, TESTS = 160, 40


def images(count, seed=0):
    """Smooth images, which JPEG hardly changes, (N, 32, 32, 3)."""
    corners = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    resized = [Image.fromarray(c).resize((32, 32), Image.Resampling.BILINEAR) for c in corners]
    return np.stack([np.asarray(image) for image in resized])


X, X_TEST = images(SAMPLES), images(TESTS, 1)
Y, Y_TEST = np.arange(SAMPLES) % 10, np.arange(TESTS) % 10


def write_npz(folder):
    np.savez(folder / "cifar.npz", x_train=X, y_train=Y[:, None], x_test=X_TEST, y_test=Y_TEST[:, None])


def write_binary(folder):
    inner = folder / "cifar-10-batches-bin"
    inner.mkdir()
    for name, x, y in (
        ("data_batch_1", X[:80], Y[:80]),
        ("data_batch_2", X[80:], Y[80:]),
        ("test_batch", X_TEST, Y_TEST),
    ):
        rows = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)], 1).astype(np.uint8)
        (inner / f"{name}.bin").write_bytes(rows.tobytes())


def write_mosaics(folder):
    for name, x in (("train_00", X[:80]), ("train_01", X[80:]), ("test_00", X_TEST)):
        tiles = x.reshape(-1, 10, 32, 32, 3).swapaxes(1, 2).reshape(-1, 320, 3)
        Image.fromarray(tiles).save(folder / f"{name}.jpg", quality=90, subsampling=0)
    np.savez(folder / "labels.npz", y_train=Y.astype(np.uint8), y_test=Y_TEST.astype(np.uint8))


FORMATS = {"npz": write_npz, "binary": write_binary, "mosaics": write_mosaics}


@pytest.fixture
def cifar(tmp_path, request):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    FORMATS[getattr(request, "param", "npz")](folder)
    return tmp_path


@pytest.mark.parametrize("cifar", FORMATS, indirect=True)
def test_cifar_is_the_same_in_every_format(cifar):
    task = find_workload("cifar10-resnet18").load(cifar, CPU)
    x = torch.tensor(X).permute(0, 3, 1, 2).float()
    deviation, mean = torch.std_mean(x, (0, 2, 3), correction=0, keepdim=True)
    lossy = task.fingerprint.startswith("jpeg-q90-")
    assert lossy == bool(list((cifar / "cifar10").glob("*.jpg")))
    assert lossy or task.fingerprint.startswith("exact-")
    wanted = (torch.tensor(X_TEST).permute(0, 3, 1, 2).float() - mean) / deviation
    torch.testing.assert_close(task.splits["test"][0], wanted, rtol=0, atol=0.3 if lossy else 1e-5)
    assert (task.splits["test"][0] - wanted).abs().mean() < (0.05 if lossy else 1e-5)
    assert torch.equal(task.splits["test"][1], torch.tensor(Y_TEST))
    sizes = {name: len(y) for name, (_, y) in task.splits.items()}
    assert sizes == {"train": 144, "validation": 16, "test": 40}


def test_the_formats_without_loss_have_one_fingerprint(tmp_path):
    found = set()
    for name in ("npz", "binary"):
        (tmp_path / name / "cifar10").mkdir(parents=True)
        FORMATS[name](tmp_path / name / "cifar10")
        found.add(find_workload("cifar10-vit-ti").load(tmp_path / name, CPU).fingerprint)
    assert len(found) == 1


def test_of_cifar_100_the_fine_labels_are_learnt(tmp_path):
    folder = tmp_path / "cifar100"
    folder.mkdir()
    for name, x in (("train", X), ("test", X_TEST)):
        fine, coarse = np.arange(len(x)) % 100, np.full(len(x), 3)
        pixels = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        (folder / f"{name}.bin").write_bytes(np.column_stack([coarse, fine, pixels]).astype(np.uint8).tobytes())
    task = find_workload("cifar100-resnet18").load(tmp_path, CPU)
    assert torch.equal(task.splits["test"][1], torch.arange(40))
    assert task.model()(task.splits["test"][0][:2]).shape == (2, 100)


def test_a_folder_without_cifar_is_named(tmp_path):
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(InputError, match="cifar10"):
        find_workload("cifar10-resnet18").load(tmp_path, CPU)
    with pytest.raises(InputError, match="cifar100"):
        find_workload("cifar100-resnet18").load(tmp_path, CPU)


def test_batches_of_cifar_are_augmented_and_the_same_for_a_seed(cifar):
    task = find_workload("cifar10-resnet18").load(cifar, CPU)

    def batches(seed):
        torch.manual_seed(seed)
        return list(islice(task.batches(seed), 2))

    first, again, other = batches(0), batches(0), batches(1)
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(first[0][1], other[0][1])
    x, y = first[0]
    assert (x.shape, x.dtype, y.shape) == ((128, 3, 32, 32), torch.float32, (128,))
    plain = {image.flatten().numpy().tobytes() for image in task.splits["train"][0]}
    unchanged = sum(image.flatten().numpy().tobytes() in plain for image in x)
    assert unchanged <= 8  # one in 162 is expected to be neither moved nor mirrored


def test_an_augmented_image_is_a_window_of_the_padded_one_or_its_mirror_image():
    torch.manual_seed(0)
    x = torch.arange(1.0, 3 * 32 * 32 + 1).view(1, 3, 32, 32).expand(200, -1, -1, -1)
    places = Counter()
    padded = nn.functional.pad(x[:1], (4,) * 4)[0]
    windows = {padded[:, i : i + 32, j : j + 32].numpy().tobytes(): (i, j) for i in range(9) for j in range(9)}
    for image in cifar10.augment(x):
        mirrored = image.numpy().tobytes() not in windows
        places[mirrored, *windows[(image.flip(-1) if mirrored else image).contiguous().numpy().tobytes()]] += 1
    assert {len({place[i] for place in places}) for i in (1, 2)} == {9}
    assert 70 < sum(count for place, count in places.items() if place[0]) < 130


def test_a_mixed_up_batch_is_its_images_and_classes_in_one_proportion():
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, 4, 4), torch.tensor([0, 2, 1, 1, 2])
    mixed, probabilities = mixed_up(x, y, 4)
    part = probabilities[0, 0].item()
    assert 0 < part < 1
    for i in range(5):
        torch.testing.assert_close(mixed[i], part * x[i] + (1 - part) * x[4 - i])
        expected = [part * (y[i] == c).item() + (1 - part) * (y[4 - i] == c).item() for c in range(4)]
        assert probabilities[i].tolist() == pytest.approx(expected)


def test_a_workload_with_mixup(cifar):
    task = replace(find_workload("cifar10-vit-s-mixup").load(cifar, CPU), batch_size=16)
    torch.manual_seed(0)
    (x, y), (_, other) = islice(task.batches(0), 2)
    assert (x.shape[1:], y.shape) == ((3, 32, 32), (len(x), 10))
    torch.testing.assert_close(y.sum(-1), torch.ones(len(x)))
    assert y.max() != other.max()  # another proportion
    model = ViT(10, 16, 2, depth=1)
    scores = task.evaluate(model, "validation")
    assert scores.keys() == {"loss", "accuracy", "brier"}  # of images as they are
    with make_optimizer("ring", model) as optimizer:
        with pytest.warns(GRNGWarning, match="soft targets"):
            task.loss(model, (x, y)).backward()
        optimizer.step()


def test_every_vision_workload_has_what_a_run_needs():
    found = [w for w in all_workloads().values() if w.name.startswith(("cifar", "tinyimagenet", "imagenet"))]
    assert {w.name.removeprefix("cifar10-") for w in found} >= set(cifar10.NETWORKS)
    for workload in found:
        assert (workload.tier, workload.metric, workload.goal) == ("full", "accuracy", "max")
        assert 0 < workload.evaluate_every < workload.steps
    with torch.device("meta"):
        for network, (_, build, *_) in cifar10.NETWORKS.items():
            assert build(10)(torch.empty(2, 3, 32, 32)).shape == (2, 10), network


# Folders of images.

CLASSES = ("n01", "n02", "n03")


def picture(index, mode="RGB"):
    """Of one colour on the left and another on the right, wider than high."""
    pixels = np.random.default_rng(index).integers(0, 256, (1, 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 24), Image.Resampling.NEAREST).convert(mode)


def save(path, index, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(index, mode).save(path, quality=95)


def write_tiny(root):
    """Tiny-ImageNet's layout: 3 classes of 10 files, one of them grey; 6 to test on."""
    for c, name in enumerate(CLASSES):
        for i in range(10):
            save(root / "train" / name / "images" / f"{name}_{i}.JPEG", 10 * c + i, "L" if i == 3 else "RGB")
        (root / "train" / name / f"{name}_boxes.txt").write_text("\n")
    lines = []
    for i in range(6):
        save(root / "val" / "images" / f"val_{i}.JPEG", 50 + i)
        lines.append(f"val_{i}.JPEG\t{CLASSES[i % 3]}\t0\t0\t5\t5\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def write_imagenet(root):
    """ImageNet's layout, with the same images."""
    for c, name in enumerate(CLASSES):
        for i in range(10):
            save(root / "train" / name / f"{name}_{i}.JPEG", 10 * c + i, "L" if i == 3 else "RGB")
    for i in range(6):
        save(root / "val" / CLASSES[i % 3] / f"val_{i}.JPEG", 50 + i)


LAYOUTS = {"tiny": write_tiny, "imagenet": write_imagenet}


def build(classes):
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3 * 16 * 16, classes))


def task_of(root, workers=0, part=1.0):
    return image_folder.load("images", "set", build, 8, 16, part, root, CPU, workers)


@pytest.fixture(params=LAYOUTS)
def folder(tmp_path, request):
    LAYOUTS[request.param](tmp_path / "set")
    return tmp_path


def equal(one, two):
    return all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


def test_both_layouts_are_read(folder):
    task = task_of(folder)
    assert {name: len(images.samples) for name, images in task.splits.items()} == {
        "train": 27,
        "validation": 3,
        "test": 6,
    }
    assert sorted(label for _, label in task.splits["test"].samples) == [0, 0, 1, 1, 2, 2]
    for name, images in task.splits.items():
        for path, label in images.samples:
            if name == "test":
                assert label == int(path.stem.split("_")[1]) % 3
            else:
                assert path.stem.split("_")[0] == CLASSES[label]
    assert task.model()(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_batches_are_the_same_for_a_seed_however_many_workers_decode_them(folder, monkeypatch):
    state = torch.get_rng_state()
    first = list(islice(task_of(folder).batches(3), 5))
    assert equal(first, islice(task_of(folder, workers=2).batches(3), 5))
    assert torch.equal(torch.get_rng_state(), state)
    seen, decoded = [], image_folder.decode
    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "decode", lambda path: seen.append(path) or decoded(path))
        assert equal(first[3:], islice(task_of(folder).batches_from(3, 3), 2))
    assert len(seen) <= 3 * len(first[0][0]), "what was trained on before is not decoded again"
    other = list(islice(task_of(folder).batches(4), 5))
    assert not torch.equal(first[0][0], other[0][0])
    assert all((x.shape, y.shape) == ((8, 3, 16, 16), (8,)) for x, y in first)


def test_an_image_is_cropped_anew_in_every_epoch(folder):
    task = task_of(folder)
    draws = list(islice(task._draws(0), 6))  # two epochs
    seeds = [seed for batch in draws for _, seed in batch]
    assert len(set(seeds)) == len(seeds)
    images = task.splits["train"]
    assert torch.equal(images[0, 5][0], images[0, 5][0])
    assert len({images[0, seed][0].numpy().tobytes() for seed in range(20)}) > 10


def test_about_half_of_the_images_are_mirrored(tmp_path, monkeypatch):
    write_tiny(tmp_path / "set")
    images = task_of(tmp_path).splits["train"]
    monkeypatch.setattr(image_folder, "random_box", lambda width, height, generator: (0, 0, width, height))
    first = images[0, 0][0]
    same = [torch.equal(images[0, seed][0], first) for seed in range(40)]
    mirrored = [torch.equal(images[0, seed][0].flip(-1), first) for seed in range(40)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 10 < sum(same) < 30


def test_evaluation_looks_at_the_centre(tmp_path):
    write_tiny(tmp_path / "set")
    save(tmp_path / "set" / "val" / "images" / "val_0.JPEG", 7)
    whole, inner = (task_of(tmp_path, part=part).splits["test"][0, None][0] for part in (1.0, 0.5))
    left, right = np.asarray(picture(7))[0, [0, -1]].astype(float)
    for image in (whole, inner):
        assert image.shape == (3, 16, 16)
        assert image.dtype == torch.uint8
        for column, colour in ((1, left), (14, right)):
            assert np.abs(image[:, 8, column].numpy().astype(float) - colour).max() < 12


def test_evaluation_gives_the_means_over_the_split(folder):
    task = task_of(folder)
    torch.manual_seed(0)
    model = task.model()
    found = task.evaluate(model, "test")
    assert model.training
    images = task.splits["test"]
    x = torch.stack([images[i, None][0] for i in range(6)]).float()
    mean, deviation = (torch.tensor(c).view(3, 1, 1) for c in (image_folder.MEAN, image_folder.DEVIATION))
    y = torch.tensor([label for _, label in images.samples])
    output = model.eval()((x - mean) / deviation)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(output, y).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((output.argmax(1) == y).float().mean().item())


def test_grey_images_have_three_equal_channels(folder):
    task = task_of(folder)
    grey = next(i for i, (path, _) in enumerate(task.splits["train"].samples) if path.stem.endswith("_3"))
    image = task.splits["train"][grey, None][0]
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"no image", b"cut off"])
def test_an_unreadable_file_is_named(tmp_path, workers, content):
    write_imagenet(tmp_path / "set")
    broken = tmp_path / "set" / "val" / "n02" / "val_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:300] if content == b"cut off" else content)
    task = task_of(tmp_path, workers)
    with pytest.raises(InputError, match=r"val_1\.JPEG is no readable image"):
        task.evaluate(task.model(), "test")


def test_a_random_box_lies_inside_and_has_the_published_range():
    generator = torch.Generator().manual_seed(0)
    boxes = [image_folder.random_box(60, 40, generator) for _ in range(500)]
    assert all(0 <= left < right <= 60 and 0 <= top < bottom <= 40 for left, top, right, bottom in boxes)
    areas = [(right - left) * (bottom - top) / 2400 for left, top, right, bottom in boxes]
    shapes = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert 0.079 < min(areas) < 0.12
    assert 0.85 < max(areas) < 1.001
    assert 0.749 < min(shapes) < 0.77
    assert 1.3 < max(shapes) < 1.334


def test_a_long_image_gives_its_central_square():
    assert image_folder.random_box(1000, 10, torch.Generator().manual_seed(0)) == (495, 0, 505, 10)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\n"), "'n09'"),
        (lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\n"), "of the class ''"),
        (lambda root: (root / "val" / "val_annotations.txt").write_text("\n"), "names no file"),
        (lambda root: (root / "train" / "n04" / "images").mkdir(parents=True), "n04.images holds no image"),
        (lambda root: (root / "train").rename(root / "training"), "train holds no folder of a class"),
    ],
)
def test_a_layout_that_is_none_is_refused(tmp_path, spoil, message):
    write_tiny(tmp_path / "set")
    spoil(tmp_path / "set")
    with pytest.raises(InputError, match=message):
        task_of(tmp_path)


def test_too_few_images_for_a_batch_are_refused(tmp_path):
    write_imagenet(tmp_path / "set")
    task = image_folder.load("images", "set", build, 64, 16, 1.0, tmp_path, CPU, 0)
    with pytest.raises(InputError, match="a batch of 64 samples out of 27"):
        next(task.batches(0))


def test_the_workloads_of_image_folders_read_the_standard_names(tmp_path):
    write_tiny(tmp_path / "tiny-imagenet-200")
    write_imagenet(tmp_path / "imagenet")
    names = {"tinyimagenet-resnet18": 64, "tinyimagenet-swin-t": 224, "imagenet-resnet50": 224, "imagenet-vgg16bn": 224}
    for name, size in names.items():
        task = find_workload(name).load(tmp_path, CPU)
        assert task.splits["test"][0, None][0].shape == (3, size, size)
        with torch.device("meta"):
            assert task.model()(torch.empty(2, 3, size, size)).shape == (2, 3)
    with pytest.raises(InputError, match="'imagenet'"):
        find_workload("imagenet-resnet50").load(None, CPU)
