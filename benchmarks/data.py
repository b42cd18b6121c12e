"""Data sets as tensors: the embedded digits, a folder with one .npz file, or a folder of MNIST-style idx files."""

import gzip
import hashlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

KEYS = ("x_train", "y_train", "x_test", "y_test")
IDX = {"x_train": "train-images", "y_train": "train-labels", "x_test": "t10k-images", "y_test": "t10k-labels"}
VALID = "'digits', a folder with one .npz file, or a folder of MNIST-style idx files"


def data_root(given: Path | None) -> Path | None:
    """The folder of the data sets: `--data`, or GRNG_DATA; None where neither was given."""
    return given or (Path(os.environ["GRNG_DATA"]) if "GRNG_DATA" in os.environ else None)


@dataclass(frozen=True)
class Dataset:
    """Standardised inputs and targets; integer targets are classes, real ones are regressed on.

    Images have shape (N, C, H, W), other inputs (N, features). `target_scale` undoes the standardisation of a
    regression's targets, so that its error is in their own units. `scored_on` says what x_test and y_test are: the
    "test" set, or the "validation" set that takes its place.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    outputs: int
    fingerprint: str
    target_scale: Tensor | None = None
    scored_on: str = "test"

    @property
    def metric(self) -> str:
        return "accuracy" if self.target_scale is None else "rmse"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss that is trained: cross-entropy for classes, squared error for real targets."""
        return F.cross_entropy(output, target) if self.metric == "accuracy" else F.mse_loss(output, target)

    def to(self, device: torch.device) -> "Dataset":
        tensors: dict[str, Any] = {
            key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def hold_out(data: Dataset) -> Dataset:
    """A tenth of the training set in place of the test set, the same samples whatever the seed of a run."""
    count = len(data.x_train) // 10
    if not count:
        raise InputError(f"{data.name} has {len(data.x_train)} training samples: a validation set takes 10 or more")
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0)).to(data.x_train.device)
    held, kept = order[:count], order[count:]
    x, y = data.x_train, data.y_train
    return replace(data, x_train=x[kept], y_train=y[kept], x_test=x[held], y_test=y[held], scored_on="validation")


def load_data(source: str) -> Dataset:
    """Load `source`: "digits", or the path of a folder (or .npz file); raise InputError for anything malformed."""
    return prepare(*read(source))


def load_shifted(source: str, other: str) -> Dataset:
    """The training set of one source with the test images of another, standardised as the former's own would be."""
    (name, arrays), (other_name, others) = read(source), read(other)
    foreign = {key: others[key] for key in ("x_test", "y_test")}
    return prepare(f"{name} against {other_name}", {**arrays, **foreign})


def read(source: str) -> tuple[str, dict[str, Any]]:
    """Name and raw arrays of a source."""
    if source == "digits":
        return "digits", digits()
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"no data at {source!r}: give {VALID}")
    if path.is_file():
        if path.suffix != ".npz":
            raise InputError(f"{path} is not a folder: give {VALID}")
        return path.stem, read_npz(path)
    archives = sorted(path.glob("*.npz"))
    if len(archives) > 1:
        raise InputError(f"{path} holds {len(archives)} .npz files: keep one, or give the path of the file")
    return path.resolve().name, read_npz(archives[0]) if archives else read_idx_folder(path)


def digits() -> dict[str, Any]:
    """scikit-learn's 1797 images of 8 x 8 pixels: a fixed stratified split, 1437 to train on and 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        bunch.images, bunch.target, test_size=0.2, stratify=bunch.target, random_state=0
    )
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def read_npz(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in KEYS if key not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "nothing"
                raise InputError(
                    f"{path} lacks {', '.join(missing)} (it holds {found}): save it with {', '.join(KEYS)}"
                )
            return {key: archive[key] for key in KEYS}
    except InputError:
        raise
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is no readable .npz file ({error}): save it again with numpy.savez") from error


def read_idx_folder(folder: Path) -> dict[str, Any]:
    arrays = {}
    for key, stem in IDX.items():
        found = sorted(folder.glob(f"{stem}-idx?-ubyte*"))
        if not found:
            raise InputError(f"{folder} holds neither a .npz file nor {stem}-idx?-ubyte(.gz): give {VALID}")
        arrays[key] = read_idx(found[0], images=key.startswith("x"))
    return arrays


def read_idx(path: Path, images: bool) -> Any:
    """Read one idx file of unsigned bytes, gzipped or not: 0, 0, 8, the number of dimensions, the sizes, the bytes."""
    import numpy as np

    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): fetch the file again") from error
    magic, valid = content[:4], (b"\0\0\x08\x03", b"\0\0\x08\x04") if images else (b"\0\0\x08\x01",)
    if magic not in valid:
        raise InputError(
            f"{path} has the magic number 0x{magic.hex() or '-'}, not {' or '.join('0x' + m.hex() for m in valid)}: "
            f"it is no idx file of {'images' if images else 'labels'} in unsigned bytes"
        )
    dimensions = magic[3]
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start]) if len(content) >= start else (-1,)
    if len(content) - start != math.prod(shape):
        raise InputError(f"{path} is cut off or damaged: it has {len(content)} bytes for shape {shape}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def prepare(name: str, arrays: Mapping[str, Any]) -> Dataset:
    """Check the four arrays, bring them into shape, and standardise them with the statistics of the training set."""
    digest = hashlib.sha256()
    for key in KEYS:
        check(name, key, arrays[key])
        digest.update(f"{arrays[key].dtype}{arrays[key].shape}".encode() + arrays[key].tobytes())
    for part in ("train", "test"):
        inputs, targets = len(arrays[f"x_{part}"]), len(arrays[f"y_{part}"])
        if inputs != targets:
            raise InputError(f"{name}: x_{part} has {inputs} samples, but y_{part} has {targets}: they must be as many")
    for key in ("x", "y"):
        train, test = arrays[f"{key}_train"].shape[1:], arrays[f"{key}_test"].shape[1:]
        if train != test:
            raise InputError(
                f"{name}: samples of {key}_train have shape {train}, of {key}_test {test}: make them equal"
            )
    x_train, x_test = standardise(inputs_of(arrays["x_train"]), inputs_of(arrays["x_test"]))[:2]
    if arrays["y_train"].dtype.kind in "iub" and arrays["y_test"].dtype.kind in "iub":
        y_train, y_test = (classes_of(name, key, arrays[key]) for key in ("y_train", "y_test"))
        outputs, scale = int(y_train.max()) + 1, None
        if int(y_test.max()) >= outputs:
            raise InputError(
                f"{name}: y_test holds the label {int(y_test.max())}, but y_train only 0 to {outputs - 1}: "
                "every class must be in the training set"
            )
        if outputs < 2:
            raise InputError(f"{name}: y_train holds one class only: give two or more, or real numbers to regress on")
    else:
        y_train, y_test, scale = standardise(*(targets_of(arrays[key]) for key in ("y_train", "y_test")))
        outputs = y_train.shape[1]
    return Dataset(name, x_train, y_train, x_test, y_test, outputs, digest.hexdigest()[:16], scale)


def check(name: str, key: str, array: Any) -> None:
    """Refuse arrays that are empty, not numbers, not finite, or of a shape that is neither images nor vectors."""
    import numpy as np

    dimensions = (2, 3, 4) if key.startswith("x") else (1, 2)
    if array.dtype.kind not in "iubf":
        raise InputError(f"{name}: {key} has dtype {array.dtype}: give integers or real numbers")
    if array.ndim not in dimensions:
        wanted = "(N, features), (N, H, W) or (N, C, H, W)" if key.startswith("x") else "(N,) or (N, outputs)"
        raise InputError(f"{name}: {key} has shape {array.shape}: give {wanted}")
    if array.size == 0:
        raise InputError(f"{name}: {key} is empty, with shape {array.shape}: give at least one sample")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise InputError(f"{name}: {key} holds {bad} values that are NaN or infinite: remove or impute them")


def inputs_of(array: Any) -> Tensor:
    x = torch.tensor(array, dtype=torch.float32) / (255 if array.dtype == "uint8" else 1)
    return x.unsqueeze(1) if x.ndim == 3 else x


def classes_of(name: str, key: str, array: Any) -> Tensor:
    if array.ndim == 2 and array.shape[1] != 1:
        raise InputError(f"{name}: {key} has shape {array.shape}: give one class a sample (argmax of one-hot rows)")
    if array.min() != 0:
        raise InputError(f"{name}: the labels in {key} start at {array.min()}: number the classes from 0")
    return torch.tensor(array.reshape(-1), dtype=torch.int64)


def targets_of(array: Any) -> Tensor:
    return torch.tensor(array.reshape(len(array), -1), dtype=torch.float32)


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean and divide by the deviation, per channel of images and per feature of vectors.

    One deviation for a whole channel, since a pixel that is almost always blank would be blown up by its own.
    """
    over = (0, 2, 3) if train.ndim == 4 else (0,)
    mean, deviation = train.mean(over, keepdim=True), train.std(over, keepdim=True, correction=0)
    deviation = torch.where(deviation > 1e-8, deviation, torch.ones_like(deviation))
    return (train - mean) / deviation, (test - mean) / deviation, deviation
