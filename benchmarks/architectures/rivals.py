"""The grid on the second-order libraries that install from the package index, each used as its documentation shows.

    pip install --target RIVALS --no-deps asdfghjkl==0.1a5 singd nngeometry curvlinops-for-pytorch einconv \
        linear_operator jaxtyping wadler_lindig mpmath tqdm
    PYTHONPATH=RIVALS python -m grng.benchmarks.architectures.rivals docs/results/architectures/rivals.json

Every case is a model from a tensor to class scores: where a row returns a score a position, their mean. One curvature
step in float32 and one in float64, of which the better counts. The factors are held against brute force in float64,
up to their scale, which every package chooses for itself; rows without a gradient may count or not, a frozen part may
be in or not, and layers whose gradients are rounding beside those of others are not judged. The symbols:

    ok     every trainable parameter has factors, and they are right
    ~      the same up to an approximation: inputs averaged over the groups of a convolution, inputs or output
           gradients summed over positions, positions or calls of a normalisation counted as samples
    skip   some trainable parameters have none, and no error says so
    raise  an exception
    WRONG  factors are not those of brute force, or the layer's own calls do not give its gradient
"""

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng.curvature import Layer
from grng.curvature.layers import make_layer
from grng.curvature.passes import find_output
from grng.curvature.plan import find_layers

from . import ARCHITECTURES, available
from .base import Architecture, Batch, regress
from .brute import Rows, is_norm, rows

B = 4
COMPILED = "_orig_mod."
CLOSE = 1e-3  # relative
TINY = 1e-5  # of output gradients, beside the largest ones: their squares are lost in float32


class Given(NamedTuple):
    """The factors of one module, as a package has them; of a normalisation a matrix (channels, 2, 2) alone."""

    parameters: Sequence[nn.Parameter]
    inputs: Tensor | None
    outputs: Tensor | None


class Verdict(NamedTuple):
    symbol: str
    words: str


Package = Callable[[nn.Module, Tensor, Tensor], dict[str, Given]]


class Scores(nn.Module):
    """A row as a map from one tensor to class scores."""

    def __init__(self, model: nn.Module, keyword: str | None) -> None:
        super().__init__()
        self.model, self.keyword = model, keyword

    def forward(self, x: Tensor) -> Tensor:
        f = find_output(self.model(x) if self.keyword is None else self.model(**{self.keyword: x}))
        assert f is not None
        return f.mean(1) if f.ndim == 3 else f


# The packages: each returns factors by module name.


def asdl(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Given]:
    """README: a KfacGradientMaker in place of forward and backward; with the true labels, so that nothing is drawn. Its
    NVTX marks, which a CPU build of torch refuses, are silenced."""
    package = import_module("asdl.precondition")
    for mark in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, mark, lambda *_: None)
    config = package.PreconditioningConfig(data_size=len(y), damping=0.01, ema_decay=1.0)
    maker = package.KfacGradientMaker(model, config, fisher_type="fisher_emp")
    output = maker.setup_model_call(model, x)
    maker.setup_loss_call(cross_entropy, output, y)
    maker.forward_and_backward()
    found = {}
    for name, module in model.named_modules():
        fisher = getattr(module, "fisher", None)
        own = list(module.parameters(recurse=False))
        if fisher is None:
            continue
        if fisher.has_kron and fisher.kron.has_data:
            found[name] = Given(own, fisher.kron.A, fisher.kron.B)
        elif fisher.has_unit and fisher.unit.has_data:
            found[name] = Given(own, fisher.unit.data, None)
    return found


def singd(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Given]:
    """The optimizer in an ordinary loop; what it has accumulated before its step."""
    optimizer = import_module("singd.optim.optimizer").SINGD(model, T=1, warn_unsupported=False)
    cross_entropy(model(x), y).backward()
    modules = {name: module for module, name in optimizer.module_names.items()}
    found = {
        name: Given(list(modules[name].parameters(recurse=False)), H.to_dense(), optimizer.H_Cs[name].to_dense())
        for name, H in optimizer.H_Ks.items()
    }
    optimizer.step()
    return found


def curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Given]:
    """The linear operator on all trainable parameters, with the true labels, and a product with it."""
    package = import_module("curvlinops")
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = package.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, [(x, y)], fisher_type="empirical", separate_weight_and_bias=False
    )
    operator @ torch.ones(operator.shape[1], dtype=parameters[0].dtype)
    return {
        name: Given([parameters[i] for i in own.values()], operator._input_covariances.get(name), outputs)
        for name, outputs in operator._gradient_covariances.items()
        for own in [operator._mapping[name]]
    }


def nngeometry(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Given]:
    """FIM of a data loader in the representation PMatKFAC: the expectation over labels."""
    package = import_module("nngeometry.metrics")
    kfac = import_module("nngeometry.object.pspace").PMatKFAC
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=len(y))
    fim = package.FIM(model=model, loader=loader, representation=kfac)
    return {name: Given(list(model.get_submodule(name).parameters()), a, g) for name, (a, g) in fim.data.items()}


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Given]:
    """extend() on model and loss, and KFLR, K-FAC with the expectation over labels in place of a sample."""
    package, extensions = import_module("backpack"), import_module("backpack.extensions")
    model, loss = package.extend(model), package.extend(nn.CrossEntropyLoss())
    with package.backpack(extensions.KFLR()):
        loss(model(x), y).backward()
    found = {}
    for name, module in model.named_modules():
        own: list[Any] = [p for p in module.parameters(recurse=False) if hasattr(p, "kflr")]
        if own and own[0] is getattr(module, "weight", None):
            outputs, inputs = own[0].kflr  # type: ignore[union-attr]
            found[name] = Given(own, inputs, outputs)
    return found


class Rival(NamedTuple):
    """A package: its name on the index, its adapter, and whether labels are true or the expectation."""

    distribution: str
    run: Package
    expected: bool


RIVALS = {
    "asdfghjkl": Rival("asdfghjkl", asdl, False),
    "singd": Rival("singd", singd, False),
    "curvlinops": Rival("curvlinops-for-pytorch", curvlinops, False),
    "nngeometry": Rival("nngeometry", nngeometry, True),
    "backpack": Rival("backpack-for-pytorch", backpack, True),
}


# The judge.


def judge(row: Architecture, rival: Rival) -> Verdict:
    """The better of what a package makes of a row in float64 and in float32: rounding is not held against it."""
    dtypes = (torch.float32, torch.float64) if row.brute else (row.dtype,)
    found = [judge_in(replace(row, dtype=dtype), rival) for dtype in dtypes]
    return min(found, key=lambda verdict: GENEROUS.index(verdict.symbol))


GENEROUS = ("ok", "~", "skip", "WRONG", "raise")


def judge_in(row: Architecture, rival: Rival) -> Verdict:
    """Run a package on a row and compare."""
    model = row.make()
    x, y = row.batch(model, B)
    keyword = None
    if isinstance(x, dict):
        ((keyword, x),) = x.items()
    if keyword or y.ndim > 1:
        model, y = Scores(model, keyword), y.reshape(len(y), -1)[:, 0]
    exact = replace(row, dtype=torch.float64)
    truth = exact.make() if model.__class__ is not Scores else Scores(exact.make(), keyword)
    try:
        with warnings.catch_warnings(), row.scope():
            warnings.simplefilter("ignore")
            given = rival.run(model, x, y)
    except Exception as error:
        return Verdict("raise", f"{type(error).__name__}: {error}".splitlines()[0][:200])
    # torch.compile wraps: names and hooks are those of what is inside.
    truth, given = plain(truth), {name.removeprefix(COMPILED): g for name, g in given.items()}
    names = {p: n for n, p in plain(model).named_parameters() if p.requires_grad}
    covered = {names[p] for g in given.values() for p in g.parameters if p in names}
    missing = sorted(set(names.values()) - covered)
    wide = x.double() if x.is_floating_point() else x
    words, compared = compare(exact, truth, (wide, y), given, rival.expected) if row.brute else ({}, covered)
    if covered - compared:
        words["no brute force"] = f"~ for {', '.join(sorted(covered - compared))}"
    wrong = {name: said for name, said in words.items() if not said.startswith("~")}
    if wrong:
        return Verdict("WRONG", "; ".join(f"{name}: {said}" for name, said in wrong.items())[:300])
    if missing:
        return Verdict("skip", f"{len(missing)} of {len(names)}: {', '.join(missing)}"[:300])
    if words:
        return Verdict("~", "; ".join(f"{name}: {said}" for name, said in words.items())[:300])
    return Verdict("ok", f"{len(names)} parameters")


def plain(model: nn.Module) -> nn.Module:
    return getattr(model, COMPILED[:-1], model)


def compare(
    row: Architecture, model: nn.Module, batch: Batch, given: dict[str, Given], expected: bool
) -> tuple[dict[str, str], set[str]]:
    """What is wrong with the factors of a package, by module; and the parameters that were compared."""
    trainable = {p for p in model.parameters() if p.requires_grad}
    layers = {layer.name: layer for layer in find_layers(model, trainable)[0]}
    for name, module in model.named_modules():  # those with weights that others use too
        layer = make_layer(name, module, trainable) if name not in layers and name in given else None
        if layer is not None and layer.name in given:
            layers[layer.name] = layer
    own = [layers[name] for name in given if name in layers]
    start = deepcopy(model.state_dict())
    incomplete = partial_gradients(row, model, batch, own)
    model.load_state_dict(start)
    truth = rows(row, model, batch, own, expected)
    sizes = {layer: max(float(e.norm()) for uses in blocks for _, e in uses) for layer, blocks in truth.items()}
    found = {}
    for layer in own:
        if layer.name in incomplete:
            found[layer.name] = f"its calls miss the gradient by {incomplete[layer.name]:.2g}"
        elif sizes.get(layer, 0.0) > TINY * max(sizes.values(), default=0.0):
            said = difference(layer, given[layer.name], truth[layer], len(batch[1]))
            if said:
                found[layer.name] = said
    names = {p: n for n, p in model.named_parameters()}
    return found, {names[p] for layer in own for p in layer.parameters}


def partial_gradients(row: Architecture, model: nn.Module, batch: Batch, layers: list[Layer]) -> dict[str, float]:
    """Layers whose calls do not account for the whole gradient of their weight, and how much is missing."""
    model.zero_grad()
    start = deepcopy(model.state_dict())  # buffers may change with every pass
    row.value(model, batch).backward()
    model.load_state_dict(start)
    seen = rows(row, model, batch, layers)
    found = {}
    for layer in layers:
        total = torch.zeros(layer.blocks, layer.n_out, layer.n_in, dtype=torch.float64)
        for block, uses in enumerate(seen.get(layer, [])):
            for x, e in uses:
                total[block] += e.T @ x / batch[1].numel()
        for p, mine in layer.views(total):
            if p.grad is not None and p.grad.norm() > 1e-12 and apart(mine, p.grad) > 1e-6:
                found[layer.name] = apart(mine, p.grad)
    return found


def difference(layer: Layer, given: Given, truth: list[list[Rows]], samples: int) -> str:
    """What distinguishes the factors, each up to its scale; nothing where they agree, and a ~ before an approximation
    that the packages document."""
    joined = [Rows(*(torch.cat(parts) for parts in zip(*uses, strict=True))) for uses in truth]
    if is_norm(layer.module):
        u = torch.stack([sum_positions([x * e for x, e in uses], samples).sum(0) for uses in truth])
        block = u.mT @ u
        if given.inputs is None:
            return "no unit-wise block"
        if any(close(given.inputs, b) for b in (block, block.flip((1, 2)))):  # whichever of scale and shift comes first
            return ""
        by_position = torch.stack([x * e for x, e in joined])
        by_call = torch.stack([sum_positions([x * e for x, e in uses], samples).flatten(0, 1) for uses in truth])
        blocks = [v.mT @ v for v in (by_position, by_call)]
        right = any(close(given.inputs, b) or close(given.inputs, b.flip((1, 2))) for b in blocks)
        return "~ positions or calls count as samples" if right else "unit-wise block"
    outputs = torch.block_diag(*(e.T @ e for _, e in joined))
    # K-FAC for convolutions takes positions for uncorrelated: then this is the same.
    summed = sum_positions([e for _, e in truth[0]], samples).flatten(0, 1)
    said = ""
    if given.outputs is not None and layer.blocks == 1 and not close(given.outputs, outputs):
        if len(summed) == len(joined[0].e) or not close(given.outputs, summed.T @ summed):
            return f"output factor off by {scale_free(given.outputs, outputs):.2g}"
        said = "~ output gradients summed over positions"
    if given.inputs is None:
        return said
    inputs = given.inputs.diag() if given.inputs.ndim == 1 else given.inputs
    if len(given.parameters) > len(layer.parameters):  # a frozen weight or bias has a part in theirs
        n = layer.n_in
        inputs = inputs[-n:, -n:] if layer.weight is None else inputs[:n, :n]
    columns = inputs.shape[1] if layer.blocks == 1 else layer.n_in
    if columns not in (layer.n_in, layer.n_in - (layer.bias is not None)):
        return f"input factor of shape {tuple(inputs.shape)}, not {tuple(joined[0].x.shape[1:]) * 2}"
    kept = [x[(e != 0).any(1), :columns] for x, e in joined]  # positions without a gradient may count, or not
    candidates = [torch.block_diag(*(x.T @ x for x in xs)) for xs in (kept, [x[:, :columns] for x, _ in joined])]
    used = torch.ones(len(inputs), dtype=torch.bool)
    padding: Any = getattr(layer.module, "padding_idx", None)
    if layer.indexed and padding is not None:  # a vector that is not trained
        used[padding] = False
    inputs, candidates = inputs[used][:, used], [c[used][:, used] for c in candidates if len(c) == len(used)]
    if any(close(inputs, candidate) for candidate in candidates):
        return said
    for count in {samples, 1} if layer.blocks == 1 else ():  # one sample: used once for all of them
        together = sum_positions([x[:, :columns] for x, _ in truth[0]], count).flatten(0, 1)
        if close(inputs, (together.T @ together)[used][:, used]):
            return "~ inputs summed over positions"
    mean = torch.stack([x for x, _ in joined]).mean(0)
    if layer.blocks > 1 and any(close(inputs, m.T @ m) for m in (mean, mean[:, : layer.n_in - 1])):
        return "~ inputs averaged over groups"
    if not candidates:
        return f"input factor of shape {tuple(inputs.shape)}, not {layer.blocks} x {tuple(joined[0].x.shape[1:]) * 2}"
    return f"input factor off by {min(scale_free(inputs, c) for c in candidates):.2g}"


def sum_positions(uses: list[Tensor], samples: int) -> Tensor:
    """(uses, samples, n)."""
    return torch.stack([rows.view(samples, -1, rows.shape[1]).sum(1) for rows in uses])


def close(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and scale_free(a, b) < CLOSE


def scale_free(a: Tensor, b: Tensor) -> float:
    """|c a - b| / |b| for the best c."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double().flatten(), b.flatten()
    if not b.any():
        return float(a.norm())
    return float(((a @ b) / (a @ a).clamp(min=1e-300) * a - b).norm() / b.norm())


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def measure(names: Sequence[str] = tuple(ARCHITECTURES)) -> dict[str, Any]:
    """Every package on every row; a package that is not installed is recorded as absent."""
    results: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "packages": {}}
    for title, rival in RIVALS.items():
        try:
            found = version(rival.distribution)
        except PackageNotFoundError:
            results["packages"][title] = {"version": "absent", "cells": {}}
            continue
        cells = {}
        for name in names:
            row = ARCHITECTURES[name]
            if row.loss is regress or row.name == "unfrozen_later" or not available(row):
                continue
            torch._dynamo.reset()
            cells[name] = judge(row, rival)._asdict()
            print(f"{title} {name}: {cells[name]['symbol']}  {cells[name]['words'][:100]}", flush=True)
        results["packages"][title] = {"version": found, "cells": cells}
    return results


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    results = measure(names or tuple(ARCHITECTURES))
    Path(path).write_text(json.dumps({"command": " ".join(["python -m", __spec__.name, path]), **results}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
