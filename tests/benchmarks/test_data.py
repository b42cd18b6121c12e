"""The three sources of data, sound and broken."""

import gzip
import struct

import numpy as np
import pytest
import torch
from grng.benchmarks.data import load_data
from grng.benchmarks.errors import InputError
from grng.benchmarks.models import MODELS, build_model

RNG = np.random.default_rng(0)


def arrays(**changes):
    """Sound arrays: 12 + 6 images of 6 x 5 bytes in 3 classes."""
    sound = {
        "x_train": RNG.integers(0, 256, (12, 6, 5), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": RNG.integers(0, 256, (6, 6, 5), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return {key: value for key, value in {**sound, **changes}.items() if value is not None}


def npz(folder, **changes):
    np.savez(folder / "data.npz", **arrays(**changes))
    return str(folder)


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx(folder, zipped=False, **changes):
    """The four files; a change replaces the bytes of one of them, or leaves it out."""
    names = {"x_train": "train-images-idx3", "y_train": "train-labels-idx1"}
    names |= {"x_test": "t10k-images-idx3", "y_test": "t10k-labels-idx1"}
    for key, content in {**{k: idx(v) for k, v in arrays().items()}, **changes}.items():
        if content is not None:
            path = folder / f"{names[key]}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped and key not in changes else content)
    return str(folder)


def test_digits_are_split_the_same_every_time_and_standardised():
    first, second = load_data("digits"), load_data("digits")
    assert (first.shape, first.outputs, len(first.x_train), len(first.x_test)) == ((1, 8, 8), 10, 1437, 360)
    assert torch.equal(first.x_test, second.x_test)
    assert first.fingerprint == second.fingerprint
    assert first.y_test.bincount().min() >= 34  # stratified
    assert abs(first.x_train.mean()) < 1e-5
    assert abs(first.x_train.std() - 1) < 1e-3


def test_bytes_are_scaled_and_standardised_with_the_training_statistics(tmp_path):
    raw = arrays()
    np.savez(tmp_path / "data.npz", **raw)
    data = load_data(str(tmp_path))
    train, test = raw["x_train"] / 255, raw["x_test"] / 255
    expected = torch.tensor((test - train.mean()) / train.std(), dtype=torch.float32).unsqueeze(1)
    torch.testing.assert_close(data.x_test, expected, rtol=1e-4, atol=1e-5)
    assert (data.metric, data.outputs, data.shape) == ("accuracy", 3, (1, 6, 5))


@pytest.mark.parametrize(("shape", "wanted"), [((7,), (7,)), ((4, 5), (1, 4, 5)), ((3, 4, 5), (3, 4, 5))])
def test_vectors_and_images_are_taken(tmp_path, shape, wanted):
    x = {"x_train": RNG.normal(size=(12, *shape)), "x_test": RNG.normal(size=(6, *shape))}
    assert load_data(npz(tmp_path, **x)).shape == wanted


def test_real_targets_are_regressed_on_in_their_own_units(tmp_path):
    y_train, y_test = 50 + 7 * RNG.normal(size=12), 50 + 7 * RNG.normal(size=6)
    data = load_data(npz(tmp_path, y_train=y_train, y_test=y_test))
    assert (data.metric, data.outputs) == ("rmse", 1)
    restored = data.y_test[:, 0] * data.target_scale + y_train.mean()
    torch.testing.assert_close(restored[0], torch.tensor(y_test, dtype=torch.float32), rtol=1e-4, atol=1e-3)


def test_a_file_is_as_good_as_its_folder(tmp_path):
    npz(tmp_path)
    assert load_data(str(tmp_path / "data.npz")).fingerprint == load_data(str(tmp_path)).fingerprint


def test_idx_zipped_or_not_equals_npz(tmp_path):
    raw = arrays()
    loaded = []
    for name, zipped in (("plain", False), ("zipped", True)):
        (tmp_path / name).mkdir()
        changes = {k: gzip.compress(idx(v)) if zipped else idx(v) for k, v in raw.items()}
        loaded.append(load_data(write_idx(tmp_path / name, zipped, **changes)))
    np.savez(tmp_path / "data.npz", **raw)
    reference = load_data(str(tmp_path / "data.npz"))
    for data in loaded:
        assert torch.equal(data.x_train, reference.x_train)
        assert torch.equal(data.y_test, reference.y_test)


NAN = np.full((12, 4), np.nan)
BAD_ARRAYS = [
    ({"y_test": None}, "lacks y_test .it holds x_train, y_train, x_test."),
    ({"y_train": np.arange(11) % 3}, "x_train has 12 samples, but y_train has 11"),
    ({"x_train": NAN, "x_test": np.zeros((6, 4))}, "x_train holds 48 values that are NaN or infinite"),
    ({"x_test": np.zeros((6, 5, 5))}, r"samples of x_train have shape \(6, 5\), of x_test \(5, 5\)"),
    ({"x_train": np.zeros((0, 6, 5))}, "x_train is empty"),
    ({"x_train": np.zeros(12)}, r"x_train has shape \(12,\)"),
    ({"y_train": 1 + np.arange(12) % 3}, "labels in y_train start at 1: number the classes from 0"),
    ({"y_train": np.arange(12) % 3 - 1}, "labels in y_train start at -1"),
    ({"y_test": np.arange(6)}, "y_test holds the label 5, but y_train only 0 to 2"),
    ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "one class only"),
    ({"y_train": np.eye(3, dtype=int)[np.arange(12) % 3], "y_test": np.eye(3, dtype=int)[np.arange(6) % 3]}, "argmax"),
    ({"y_train": np.array(list("abcabcabcabc"))}, "y_train has dtype <U1"),
    ({"x_train": np.array([{}] * 12)}, "no readable .npz file"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_data(npz(tmp_path, **changes))


BAD_IDX = [
    ({"y_test": None}, "t10k-labels-idx"),
    ({"x_train": idx(np.zeros(12))}, "magic number 0x00000801, not 0x00000803"),
    ({"y_train": b""}, "magic number 0x-, not 0x00000801: it is no idx file of labels"),
    ({"x_test": idx(np.zeros((6, 6, 5)))[:-1]}, "cut off or damaged"),
    ({"x_test": bytes([0, 0, 8, 3, 0])}, "cut off or damaged"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_IDX)
def test_bad_idx_files_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_data(write_idx(tmp_path, **changes))


def test_a_damaged_gz_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_data(write_idx(tmp_path, zipped=True, x_train=b"no gzip"))


def test_bad_places_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "data.npz").write_bytes(b"no zip")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        np.savez(tmp_path / "two" / f"{name}.npz", **arrays())
    for source, message in [
        ("nowhere", "no data at 'nowhere': give 'digits', a folder"),
        (str(tmp_path), "holds neither a .npz file nor train-images"),
        (str(tmp_path / "notes.txt"), "is not a folder"),
        (str(tmp_path / "fake"), "no readable .npz file"),
        (str(tmp_path / "two"), "holds 2 .npz files"),
    ]:
        with pytest.raises(InputError, match=message):
            load_data(source)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 7, 9)])
def test_models_fit_the_data_and_have_second_derivatives(name, shape):
    torch.manual_seed(0)
    model = build_model(name, shape, 4)
    x = torch.randn(3, *shape)
    output = model(x)
    assert output.shape == (3, 4)
    gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()), create_graph=True)
    torch.stack([g.square().sum() for g in gradients]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "shape"), [("cnn", (64,)), ("transformer", (64,)), ("cnn", (1, 3, 9))])
def test_models_refuse_what_they_cannot_take(name, shape):
    with pytest.raises(InputError, match="use --model mlp"):
        build_model(name, shape, 4)
