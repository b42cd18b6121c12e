"""Which parameters are trained, which of them belong to layers with curvature, and why the others do not."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from grng.curvature.attention import attention_layers
from grng.curvature.capture import Capture
from grng.curvature.coverage import Coverage, Row
from grng.curvature.engines import Hook
from grng.curvature.layers import Layer, make_layer, plain_layer
from grng.curvature.order import ORDERS, ROWS, SECOND
from grng.distributed import shards
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
    sharded = shards(model)
    if sharded:
        raise invalid(
            "model",
            f"sharded ({sharded})",
            "a module that holds its parameters whole",
            "Factors need whole matrices: wrap the model in torch.nn.parallel.DistributedDataParallel.",
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
    if isinstance(params, Tensor | str | bytes) or not isinstance(params, Iterable):
        kind = "a tensor" if isinstance(params, Tensor) else repr(params)
        raise TypeError(f"params must be an iterable of tensors, (name, tensor) pairs or dicts, but is {kind}")
    given = list(params)
    groups = [dict(g) for g in given] if given and isinstance(given[0], dict) else [{"params": given}]
    for group in groups:
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        strangers = [tuple(p.shape) if isinstance(p, Tensor) else p for p in tensors if not in_model(p, names)]
        if strangers:
            raise invalid("params", strangers, "parameters of the model", "Tensors of these shapes are not.")
        group["params"] = [entry for entry, p in zip(entries, tensors, strict=True) if p.requires_grad]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise invalid("params", "nothing trainable", "at least one parameter with requires_grad=True")
    return groups


def in_model(p: Any, names: dict[nn.Parameter, str]) -> bool:
    return isinstance(p, Tensor) and p in names


def find_layers(
    model: nn.Module,
    trainable: set[nn.Parameter],
    others: bool = False,
    obstacle: Callable[[Layer], str] = lambda layer: "",
) -> tuple[list[Layer], dict[nn.Parameter, str]]:
    """Layers with curvature, and for every other trainable parameter the reason why it has none; with `others` each of
    these is a plain layer. `obstacle` says of a layer why it has none, or ""."""
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
        for layer in _layers_of(name, module, trainable):
            shared = [p for p in layer.parameters if len(users[p]) > 1]
            reason = f"a weight is shared between {', '.join(users[shared[0]])}" if shared else obstacle(layer)
            if reason:
                reasons.update(dict.fromkeys(layer.parameters, reason))
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


def _layers_of(name: str, module: nn.Module, trainable: set[nn.Parameter]) -> list[Layer]:
    if isinstance(module, nn.MultiheadAttention):
        return attention_layers(name, module, trainable)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return []  # attention's out_proj, which is no call of its own
    layer = make_layer(name, module, trainable)
    return [] if layer is None else [layer]


ORDER_NOTES = {
    **dict.fromkeys(ORDERS, ""),
    SECOND: ", positions before samples",
    ROWS: ", rows in no order of samples: each counts as one",
}


def coverage_of(
    names: dict[nn.Parameter, str],
    trained: list[nn.Parameter],
    layers: list[Layer],
    reasons: dict[nn.Parameter, str],
    capture: Capture,
    method: str,
    fallback: str,
    remark: Callable[[Layer], str],
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
        kind = type(layer.module).__name__ + f" ({layer.blocks} blocks)" * (layer.blocks > 1) + ORDER_NOTES[layer.order]
        kind += remark(layer)
        reason = layer.reason or (f"diagonal: {reasons[p]}" if layer.plain else kind)
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
