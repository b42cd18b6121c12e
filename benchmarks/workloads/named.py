"""Any image classifier of timm or transformers, and any causal language model of transformers, by name and from random
weights: on CIFAR-10, or on Tiny Shakespeare by characters.

    timm:NAME             what timm.create_model knows, as timm:resnet18
    transformers:NAME     a model type with its own defaults, as vit or gpt2; for images of 32 pixels in patches of 4
    transformers:FOLDER   the config.json in it, as it is but for the number of classes or characters

Neither package comes with the benchmarks (timm brings torchvision along), and nothing is downloaded.
"""

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..loop import forked
from .base import Supervised, Workload, folder_of
from .cifar10 import classify
from .cifar_files import SIDE
from .gpt import passages

PACKAGES = ("timm", "transformers")
BATCH = 128
EPOCH = 45_000 // BATCH
PATCH = 4
BLOCK, WINDOWS = 256, 64  # tokens of a window at most, windows a step: those of shakespeare-gpt


class Logits(nn.Module):
    """A model of transformers as a function of what it calls `argument`."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.argument: x}).logits


def is_named(name: str) -> bool:
    """Whether a workload's name says the package that its model is from.

    >>> is_named("timm:resnet18"), is_named("digits-mlp")
    (True, False)
    """
    return name.startswith(tuple(f"{package}:" for package in PACKAGES))


def named_workload(name: str) -> Workload:
    """The workload of a name such as timm:resnet18; the model is looked up when the workload is loaded."""
    package, _, model = name.partition(":")
    if package not in PACKAGES or not model:
        raise InputError(f"no workload {name!r}: give timm:NAME, transformers:NAME or transformers:FOLDER")
    if is_language(name):
        return Workload(
            name=name,
            about=f"{model} of {package} on Tiny Shakespeare by characters",
            tier="full",
            load=partial(load_text, name),
            batch_size=WINDOWS,
            steps=5000,
            evaluate_every=250,
            metric="loss",
            goal="min",
            data=("tinyshakespeare",),
            needs=(package,),
        )
    return Workload(
        name=name,
        about=f"{model} of {package} on CIFAR-10",
        tier="full",
        load=partial(load_images, name),
        batch_size=BATCH,
        steps=100 * EPOCH,
        evaluate_every=EPOCH,
        metric="accuracy",
        goal="max",
        data=("cifar10",),
        needs=(package,),
    )


def is_language(name: str) -> bool:
    """Whether a name such as transformers:gpt2 is that of a causal language model."""
    package, _, model = name.partition(":")
    if package != "transformers":
        return False
    file = Path(model).expanduser() / "config.json"
    try:
        kind = json.loads(file.read_text("utf-8")).get("model_type") if file.is_file() else model
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as LANGUAGE
    except (ImportError, ValueError, AttributeError, OSError):  # which loading tells
        return False
    return kind in LANGUAGE


def load_images(name: str, root: Path | None, device: torch.device) -> Supervised:
    task = classify(folder_of(root, "cifar10", name), partial(build_named, name), BATCH, device)
    try_out(name, task, f"images of {SIDE} pixels")
    return task


def load_text(name: str, root: Path | None, device: torch.device) -> Supervised:
    folder_of(root, "tinyshakespeare", name)
    longest = getattr(config_of(name.partition(":")[2]), "max_position_embeddings", BLOCK)
    block = min(BLOCK, longest)
    task = passages(name, "tinyshakespeare", root, partial(build_named, name), block, WINDOWS, device)
    try_out(name, task, f"windows of {block} tokens")
    return task


def build_named(name: str, classes: int) -> nn.Module:
    """The model of a name such as timm:resnet18, for so many classes or different tokens."""
    package, _, model = name.partition(":")
    try:
        if package == "timm":
            return import_module("timm").create_model(model, pretrained=False, num_classes=classes, in_chans=3)
        import transformers

        if is_language(name):
            config = config_of(model, vocab_size=classes, use_cache=False)
            return Logits(transformers.AutoModelForCausalLM.from_config(config), "input_ids")
        config = config_of(model, num_labels=classes)
        return Logits(transformers.AutoModelForImageClassification.from_config(config), "pixel_values")
    except ImportError as error:
        raise InputError(f"workload {name!r} needs the package {package} ({error}): pip install {package}") from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{package} makes no classifier and no language model of {model!r}: {error}") from error


def config_of(model: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    folder = Path(model).expanduser()
    if folder.exists():
        return AutoConfig.from_pretrained(folder, local_files_only=True, **changes)
    usual = AutoConfig.for_model(model)
    sizes = {"image_size": SIDE, "patch_size": PATCH}
    known = {key: size for key, size in sizes.items() if isinstance(getattr(usual, key, None), int)}
    return AutoConfig.for_model(model, **changes, **known)


def try_out(name: str, task: Supervised, what: str) -> None:
    """Raise InputError for a model that does not take the inputs, as one for images of 224 pixels may not."""
    x = task.splits["test"][0][:2]
    with forked(x.device), torch.no_grad():
        model = task.build().to(x.device).eval()
        try:
            model(x)
        except Exception as error:  # whatever a model raises for the wrong size
            raise InputError(f"workload {name!r}: the model takes no {what} ({error})") from error
