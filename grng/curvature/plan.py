"""Which parameters are trained, which of them belong to layers with curvature, and why the others do not."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from grng.curvature.capture import Capture
from grng.curvature.coverage import Coverage, Row
from grng.curvature.engines import Hook
from grng.curvature.layers import Layer, make_layer, plain_layer
from grng.errors import invalid


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be trained, and a model that another GRNG is attached to."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, but is: {type(model).__name__}. GRNG hooks into the layers: pass the "
            "model itself, and choose parameters with params="
        )
    for name, module in model.named_modules():
        hooks = module._state_dict_pre_hooks.values()
        if any(isinstance(hook, Hook) and hook.owner() is not None for hook in hooks):
            raise RuntimeError(
                f"another GRNG optimizer is attached to {name or 'this model'}: call its close() first (two would "
                "count every statistic twice). Parameters with settings of their own go into params= as groups"
            )
    if not any(True for _ in model.parameters()):
        raise invalid("model", type(model).__name__, "a module with parameters")


def named_groups(
    model: nn.Module, params: Iterable[Any] | None, names: dict[nn.Parameter, str]
) -> list[dict[str, Any]]:
    """Param groups out of `params`, checked against the model."""
    if params is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise invalid("model", type(model).__name__, "one with a trainable parameter", "All are frozen.")
        return [{"params": trainable}]
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, (name, tensor) pairs or dicts, but is a tensor")
    given = list(params)
    groups = [dict(g) for g in given] if given and isinstance(given[0], dict) else [{"params": given}]
    for group in groups:
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        entries = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        strangers = [tuple(p.shape) for p in entries if p not in names]
        if strangers:
            raise invalid("params", strangers, "parameters of the model", "Tensors of these shapes are not.")
        group["params"] = [p for p in entries if p.requires_grad]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise invalid("params", "nothing trainable", "at least one parameter with requires_grad=True")
    return groups


def find_layers(
    model: nn.Module, trainable: set[nn.Parameter], others: bool = False
) -> tuple[list[Layer], dict[nn.Parameter, str]]:
    """Layers with curvature, and for every other trainable parameter the reason why it has none; with `others` each of
    these is a plain layer."""
    users: dict[nn.Parameter, list[str]] = {}
    kinds: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                users.setdefault(p, []).append(name or "the model")
                kinds.setdefault(p, type(module).__name__)
        if isinstance(module, nn.Embedding) and module.sparse and module.weight in trainable:
            raise invalid(f"{name}.sparse", True, "False", "Sparse gradients are not supported.")
    layers, reasons = [], {}
    for name, module in model.named_modules():
        layer = make_layer(name, module, trainable)
        if layer is None:
            continue
        shared = [p for p in layer.parameters if len(users[p]) > 1]
        if shared:
            for p in layer.parameters:
                reasons[p] = f"a weight is shared between {', '.join(users[shared[0]])}"
        else:
            layers.append(layer)
    covered = {p for layer in layers for p in layer.parameters}
    for p in trainable - covered:
        reasons.setdefault(p, f"no factors for {kinds[p]}")
    if others:
        for name, p in model.named_parameters():
            if p in reasons:
                layers.append(plain_layer(name, model, p))
    return layers, reasons


def coverage_of(
    names: dict[nn.Parameter, str],
    trained: list[nn.Parameter],
    layers: list[Layer],
    reasons: dict[nn.Parameter, str],
    capture: Capture,
    method: str,
    fallback: str,
) -> Coverage:
    """One row a trained parameter."""
    owner = {p: layer for layer in layers for p in layer.parameters}
    rows = []
    for p in trained:
        layer, shape = owner.get(p), "x".join(map(str, p.shape)) or "scalar"
        if layer is None:
            rows.append(Row(names[p], shape, fallback, "-", "-", reasons[p]))
            continue
        verified = {"pending": "pending", "verified": "yes", "failed": "no"}[layer.status]
        treatment = method if layer.active else fallback
        reason = layer.reason or (
            f"diagonal: {reasons[p]}"
            if layer.plain
            else type(layer.module).__name__ + f" ({layer.blocks} blocks)" * (layer.blocks > 1)
        )
        rows.append(Row(names[p], shape, treatment, capture.engine.name, verified, reason))
    fisher = capture.config.fisher
    likelihood = capture.fisher.likelihood.name if capture.fisher.likelihood else "none"
    return Coverage(
        rows,
        [
            f"engine: {capture.engine.name} ({capture.engine_reason})",
            f"fisher: {fisher}; likelihood: {likelihood} ({capture.fisher.reason})",
        ],
    )
