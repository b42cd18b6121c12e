"""Formulas broken on purpose, one at a time: the tests named beside each must fail.

    python -m tests.mutations          # all of them, a few minutes
    python -m tests.mutations momentum # those whose name contains that

It works on a copy of the package in a temporary folder, so that nothing here is touched.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"grng": "grng", "kernels": "grng/kernels", "baselines": "grng/baselines", "benchmarks": "grng/benchmarks"}
CACHES = shutil.ignore_patterns("__pycache__")


class Mutation(NamedTuple):
    """In `file`, `old` (there once) becomes `new`; `tests` are what pytest is given."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "factors beyond the limit",
        "grng/preconditioners/kfac.py",
        "return config.beyond(*layer.sides)",
        'return ""',
        "tests/optimizer/test_large_layers.py -k beyond_the_limit",
    ),
    Mutation(
        "words counted as a side",
        "grng/curvature/layers.py",
        "1 if self.indexed else self.n_in",
        "self.n_in",
        "tests/optimizer/test_large_layers.py -k beyond_the_limit",
    ),
    Mutation(
        "a model that is moved under its optimizer",
        "grng/keeping.py",
        "if self._where() == self._places:",
        "if True:",
        "tests/optimizer/test_resume.py -k another_precision",
    ),
    Mutation(
        "averages in the precision that the model had",
        "grng/keeping.py",
        "self._curvature.factor_dtype(p) if name in AS_GRADIENTS else None",
        "None",
        "tests/optimizer/test_resume.py -k another_precision",
    ),
    Mutation(
        "a loss beside the cast that is returned",
        "grng/curvature/capture.py",
        "if node is not f.grad_fn:",
        "if False:",
        "tests/optimizer/test_contract.py -k go_through_the_cast",
    ),
    Mutation(
        "a cast and what it is of, both measured",
        "grng/curvature/passes.py",
        "return self.heard != before",
        "return True",
        "tests/optimizer/test_contract.py -k of_the_cast",
    ),
    Mutation(
        "a place that leads back to the output's cast",
        "grng/curvature/engines.py",
        "node, number, *_ = origin(get_gradient_edge(output))",
        "node, number, *_ = get_gradient_edge(output)",
        "tests/curvature/test_lifecycle.py -k pins_nothing",
    ),
    Mutation(
        "a buffer that is drawn from",
        "benchmarks/workloads/deepobs.py",
        "place = int(draw * len(buffer))",
        "place = 0",
        "tests/benchmarks/test_deepobs_ddpm.py -k drawn",
    ),
    Mutation(
        "files in another order",
        "benchmarks/workloads/deepobs.py",
        "torch.randperm(FILES, generator=generator_of(seed, epoch))",
        "torch.randperm(FILES, generator=generator_of(seed, 0))",
        "tests/benchmarks/test_deepobs_ddpm.py -k epochs",
    ),
    Mutation(
        "a half that is frozen",
        "grng/attached.py",
        "len({p.requires_grad for p in layer.parameters}) > 1",
        "not layer.weight.requires_grad",
        "tests/optimizer/test_unfrozen.py -k half",
    ),
    Mutation(
        "calls of one layer joined",
        "grng/curvature/delivery.py",
        "if len(parts) > 1 and alike",
        "if len(parts) > 9 and alike",
        "tests/optimizer/test_visits.py -k belong_together",
    ),
    Mutation(
        "strength that is never zero",
        "benchmarks/bench/spaces.py",
        "if u < self.zero:",
        "if u < 0:",
        "tests/benchmarks/test_bench_spaces.py",
    ),
    Mutation(
        "warm-up of whole steps",
        "benchmarks/bench/trial.py",
        "(steps if self.lr_warmup < 1 else 1)",
        "steps",
        "tests/benchmarks/test_bench_trial.py -k rises",
    ),
    Mutation(
        "what is measured before a step on the clock",
        "benchmarks/loop.py",
        "if before_last and piece is pieces[-1]:",
        "if before_last and piece is pieces[0]:",
        "tests/benchmarks/test_bench_trial.py -k clock_stands",
    ),
    Mutation(
        "gradients of another step correlated",
        "benchmarks/bench/diagnosis.py",
        "            self.last = None\n        return row",
        "        return row",
        "tests/benchmarks/test_bench_trial.py -k pearson",
    ),
    Mutation(
        "a tier with all it lacks",
        "benchmarks/bench/protocol.py",
        "[name for name in names if not lacks[name]]",
        "list(names)",
        "tests/benchmarks/test_bench_input.py -k tier",
    ),
    Mutation(
        "mixup of classes in another proportion",
        "benchmarks/workloads/augmentation.py",
        "part * probabilities + (1 - part) * probabilities.flip(0)",
        "(1 - part) * probabilities + part * probabilities.flip(0)",
        "tests/benchmarks/test_vision_workloads.py -k mixed_up",
    ),
    Mutation(
        "distances with a sign",
        "benchmarks/networks/tinyvit.py",
        "row * side + column",
        "column * side + row",
        "tests/benchmarks/test_networks.py -k distance",
    ),
    Mutation(
        "passes that train nothing",
        "grng/curvature/passes.py",
        "if torch._C._will_engine_execute_node(get_gradient_edge(p).node) else",
        "if True else",
        "tests/optimizer/test_visits.py -k attacks",
    ),
    Mutation(
        "appointments",
        "grng/curvature/visits.py",
        "max(wait, 1 if before == NEVER else t - before)",
        "1",
        "tests/optimizer/test_visits.py -k turns",
    ),
    Mutation(
        "an assumed normaliser under a scale",
        "grng/curvature/fisher.py",
        "reading.normaliser / self.scale.to(reading.normaliser)",
        "reading.normaliser",
        "tests/optimizer/test_mixed_precision.py -k matter",
    ),
    Mutation(
        "ratios both ways",
        "benchmarks/statistics.py",
        "np.median(x, axis=-1)",
        "np.quantile(x, 0.5, axis=-1, method='lower')",
        "tests/benchmarks/test_statistics.py -k exchanged",
    ),
    Mutation(
        "Gram matrix in panels",
        "kernels/gram.py",
        "panel[..., size:].mT",
        "panel[..., size:].mT.abs()",
        "tests/kernels/test_gram.py",
    ),
    Mutation(
        "patches of a convolution, some at a time",
        "grng/curvature/statistics.py",
        ".flatten(2, -2).mul_(counted)",
        ".flatten(2, -2).mul_(counts[:, :1])",
        "tests/curvature/test_statistics.py",
    ),
    Mutation(
        "Gram matrix",
        "kernels/gram.py",
        "return flat.mT @ flat",
        "return flat.mT @ flat.abs()",
        "tests/kernels/test_gram.py",
    ),
    Mutation(
        "bias column",
        "grng/curvature/geometry.py",
        "gradients.new_ones(",
        "gradients.new_zeros(",
        "tests/curvature/test_layers.py",
    ),
    Mutation(
        "scale of a norm",
        "grng/curvature/statistics.py",
        "[x * e]",
        "[x.abs() * e]",
        "tests/curvature/test_layers.py -k norm",
    ),
    Mutation(
        "turned kernel",
        "grng/curvature/geometry.py",
        "return windows.flip(tuple(range(-len(lengths), 0)))",
        "return windows",
        "tests/curvature/test_layers.py -k transposed",
    ),
    Mutation(
        "keys and values of attention",
        "grng/curvature/attention.py",
        "start = self.part * self.width // 3",
        "start = 0",
        "tests/curvature/test_engines.py -k cross",
    ),
    Mutation(
        "damping by the gradient's norm",
        "grng/damping.py",
        "lam = rho * square_norm",
        "lam = rho * square_norm.sqrt()",
        "tests/optimizer/test_first_step.py -k first_direction",
    ),
    Mutation(
        "the quadratic model of the loss",
        "grng/optimizer.py",
        "torch.stack(linear).sum() + quadratic.sum() / 2",
        "torch.stack(linear).sum() + quadratic.sum()",
        "tests/optimizer/test_levenberg.py -k dense",
    ),
    Mutation(
        "damping by the reduction of the loss",
        "grng/damping.py",
        "better = descent & (ratio > 0.75)",
        "better = descent & (ratio < 0.75)",
        "tests/optimizer/test_levenberg.py -k rule",
    ),
    Mutation(
        "trust region",
        "grng/region.py",
        ".sqrt().clamp(max=1)",
        ".clamp(max=1)",
        "tests/optimizer/test_first_step.py -k kl_clip",
    ),
    Mutation(
        "momentum in a layer's trust region",
        "grng/region.py",
        "self.step_clip * (1 - self._momenta(groups))",
        "self.step_clip * (1 + self._momenta(groups))",
        "tests/optimizer/test_layerwise.py -k within_reach",
    ),
    Mutation(
        "the growth of a layer's trust region",
        "grng/region.py",
        "GROWTH = 3.0",
        "GROWTH = 30.0",
        "tests/optimizer/test_layerwise.py -k grows",
    ),
    Mutation(
        "the weights that a layer's trust region goes by",
        "grng/region.py",
        "torch.where(self.start > 0, self.start, sizes)",
        "sizes",
        "tests/optimizer/test_layerwise.py -k grows",
    ),
    Mutation(
        "the same in a checkpoint",
        "grng/region.py",
        "self.start = state[STATE].clone()",
        "pass",
        "tests/optimizer/test_layerwise.py -k grows",
    ),
    Mutation(
        "the product in the eigenbasis",
        "grng/preconditioners/kfac.py",
        "solved *= 1 + rho",
        "solved *= 1 - rho",
        "tests/optimizer/test_large_layers.py -k penalised",
    ),
    Mutation(
        "the same where curvature is left out",
        "grng/preconditioners/kfac.py",
        "s * (1 - rho.to(s.dtype) * lam)",
        "s * (1 + rho.to(s.dtype) * lam)",
        "tests/optimizer/test_large_layers.py -k penalised",
    ),
    Mutation(
        "what is negligible under a penalty",
        "grng/preconditioners/kfac.py",
        "floor / (1 + rho * floor)",
        "floor * (1 + rho * floor)",
        "tests/optimizer/test_large_layers.py -k penalised",
    ),
    Mutation(
        "K-FAC derived from",
        "grng/preconditioners/kfac.py",
        'if self.solver == "eigen" and not derived:',
        'if self.solver == "eigen":',
        "tests/optimizer/test_large_layers.py -k penalised",
    ),
    Mutation(
        "the form of a clipped penalty",
        "grng/optimizer.py",
        "if self._region.kl_clip is not None:  # whose",
        "if False:  # whose",
        "tests/optimizer/test_first_step.py -k kl_clip",
    ),
    Mutation(
        "a layer's share of the damping",
        "grng/matrices.py",
        "values / values.amax()",
        "(values / values.amax()).sqrt()",
        "tests/optimizer/test_layerwise.py -k damping_by_layer",
    ),
    Mutation(
        "grey targets",
        "grng/curvature/likelihood.py",
        "most = torch.where(g > 0, p, 1 - p)",
        "most = p",
        "tests/curvature/test_likelihood.py -k grey",
    ),
    Mutation(
        "elements of a sample's output in the trust region",
        "grng/curvature/fisher.py",
        "(batch.predictions / max(batch.samples, 1))",
        "(batch.predictions / batch.predictions)",
        "tests/optimizer/test_first_step.py -k kl_clip_counts",
    ),
    Mutation(
        "K-FAC's eigenvalues",
        "grng/preconditioners/kfac.py",
        "/ -(s + lam)",
        "/ -(s + 2 * lam)",
        "tests/optimizer/test_first_step.py -k first_direction",
    ),
    Mutation(
        "EKFAC's basis",
        "grng/preconditioners/ekfac.py",
        "statistics.squared_gradients(self.U_g.of(layer), U_l)",
        "statistics.squared_gradients(self.U_g.of(layer).mT, U_l)",
        "tests/optimizer/test_first_step.py -k first_direction",
    ),
    Mutation(
        "the filter's gain",
        "grng/preconditioners/kalman.py",
        "gain(gram, N.to(projected.dtype) * projected)",
        "gain(gram, projected)",
        "tests/optimizer/test_kalman.py",
    ),
    Mutation(
        "GNP's second gradient",
        "grng/regularizers/gnp.py",
        "return 0.8 if alpha is None else alpha",
        "return 0.8",
        "tests/regularizers/test_rules.py",
    ),
    Mutation(
        "AGR's share",
        "grng/regularizers/agr.py",
        "return g - g * (strength * share)",
        "return g - strength * share",
        "tests/regularizers/test_rules.py",
    ),
    Mutation(
        "Adan's difference",
        "baselines/adan.py",
        "_foreach_lerp_(v, d, 1 - b2)",
        "_foreach_lerp_(v, d, b2)",
        "tests/baselines/test_adan.py",
    ),
    Mutation(
        "the fallback decays by its own rate",
        "grng/update.py",
        "_decay_(others, rate * decay * gate)",
        "_decay_(others, lr * decay * gate)",
        "tests/optimizer/test_first_step.py -k weight_decay",
    ),
    Mutation(
        "plain values in a checkpoint",
        "benchmarks/compare.py",
        "str(torch.__version__)",
        "torch.__version__",
        "tests/benchmarks/test_bench_trial.py -k killed",
    ),
    Mutation(
        "the step's rate",
        "grng/update.py",
        'group["momentum"], gate), lr * gate)',
        'group["momentum"], gate), lr * lr * gate)',
        "tests/optimizer/test_contract.py",
    ),
    Mutation(
        "N of several backward passes",
        "grng/curvature/passes.py",
        "normaliser = torch.where(weight > 0, predictions / weight, other.normaliser)",
        "normaliser = other.normaliser",
        "tests/optimizer/test_walks.py",
    ),
    Mutation(
        "gradients that were dropped",
        "grng/curvature/ties.py",
        "if self._counted not in (None, task) and not",
        "if False and not",
        "tests/optimizer/test_visits.py",
    ),
    Mutation(
        "a verdict on zero",
        "grng/curvature/check.py",
        "return None  # nothing equals nothing, as behind a last layer that begins at zero",
        "pass",
        "tests/curvature/test_self_check.py",
    ),
    Mutation(
        "autocast's cache",
        "grng/regularizers/displacement.py",
        "torch.clear_autocast_cache()  # an autocast around the passes keeps casts of the weights",
        "pass",
        "tests/regularizers/test_care.py",
    ),
    Mutation(
        "a tensor on the host",
        "kernels/solve.py",
        "torch.eye(n, dtype=U.dtype, device=U.device)",
        "torch.eye(n, dtype=U.dtype)",
        "tests/device/test_device.py -k cnn-5",
    ),
    Mutation(
        "a wait at each step",
        "kernels/precondition.py",
        "large = (s > least) | (least <= 0)",
        "large = (s > least) | bool((least <= 0).any())",
        "tests/device/test_device.py -k waits",
    ),
    Mutation(
        "an autocast around the device's thread",
        "kernels/precision.py",
        "with torch.autocast(device.type, enabled=False):",
        'with torch.autocast("cpu", enabled=False):',
        "tests/device/test_device.py -k autocast",
    ),
    Mutation(
        "a look between micro-batches",
        "grng/curvature/ties.py",
        "and self._counted is not None and is_look()",
        "and False",
        "tests/optimizer/test_walks.py -k micro_batches",
    ),
    Mutation(
        "a target's digits",
        "benchmarks/statistics.py",
        'rounded = float(f"{value:.{DIGITS}g}")',
        "rounded = value",
        "tests/benchmarks/test_statistics.py",
    ),
    Mutation(
        "a regularized row's space",
        "benchmarks/bench/roster.py",
        "for known in (optimizer_of(name), base_of(name)):",
        "for known in (optimizer_of(name),):",
        "tests/benchmarks/test_bench_roster.py",
    ),
)


def passes(tests: str, mutation: Mutation | None = None) -> bool:
    """Whether tests pass, on the package as it is or with a mutation."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source, target in {**FOLDERS, "tests": "tests"}.items():
            shutil.copytree(ROOT / source, folder / target, ignore=CACHES, dirs_exist_ok=True)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutation is not None:
            top, _, rest = mutation.file.partition("/")
            file = folder / FOLDERS[top] / rest
            text = file.read_text()
            if (times := text.count(mutation.old)) != 1:
                raise SystemExit(f"{mutation.name}: {mutation.old!r} is {times} times in {mutation.file}, not once")
            file.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
        environment = {**os.environ, "PYTHONPATH": name}  # before an installed package
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
        if run.returncode not in (0, 1):
            raise SystemExit(f"{tests}: did not run\n{run.stdout.decode()[-2000:]}")
        return run.returncode == 0


def main() -> None:
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    for tests in dict.fromkeys(mutation.tests for mutation in chosen):
        if not passes(tests):
            raise SystemExit(f"{tests}: fails on the package as it is")
    alive = 0
    for mutation in chosen:
        lives = passes(mutation.tests, mutation)
        alive += lives
        print(f"{'LIVES ' if lives else 'killed'}  {mutation.name}: {mutation.old}  ->  {mutation.new}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed")
    sys.exit(alive > 0)


if __name__ == "__main__":
    main()
