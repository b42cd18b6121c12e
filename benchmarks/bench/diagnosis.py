"""Diagnostics beside a run, off the clock: gradient norm, Pearson's r of consecutive gradients, sharpness.

They describe where a run went; none of them is evidence of generalisation (Andriushchenko et al. 2023 found sharpness
to follow the learning rate rather than the test error), and the gradient norm is the very thing that is regularised.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..loop import forked
from ..workloads import Task

SEED = 987_654_321  # of the batch that is looked at, the same one for every optimizer


class Diagnosis:
    """Measures on one fixed batch, in evaluation mode: before a step (`before`), after it (the call), in the end."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device = task, device
        with forked(device):
            torch.manual_seed(SEED)
            self.batch = next(task.batches(SEED))
        self.last: Tensor | None = None

    def gradient(self, model: nn.Module, create_graph: bool = False) -> tuple[Tensor, list[Tensor]]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = self.task.loss(model, self.batch)
        found = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
        pairs = [(g, p) for g, p in zip(found, parameters, strict=True) if g is not None]
        return torch.cat([g.flatten() for g, _ in pairs]), [p for _, p in pairs]

    def before(self, model: nn.Module) -> None:
        """Keep the gradient that `__call__` compares with, a step later."""
        self.last = self._evaluated(model)

    def _evaluated(self, model: nn.Module) -> Tensor:
        model.eval()
        g, _ = self.gradient(model)
        model.train()
        return g

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The gradient's norm, and its correlation with that of a step before."""
        g = self._evaluated(model)
        row = {"gradient_norm": g.norm().item()}
        if self.last is not None:
            a, b = g - g.mean(), self.last - self.last.mean()
            row["pearson"] = (a @ b / (a.norm() * b.norm()).clamp(min=1e-30)).clamp(-1, 1).item()
            self.last = None
        return row

    def sharpness(self, model: nn.Module, restarts: int = 5) -> dict[str, Any]:
        """The largest eigenvalue of the Hessian, by Lanczos; None where the model has no second derivative."""
        import numpy as np
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
        from torch.nn.attention import SDPBackend, sdpa_kernel

        model.eval()
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
                g, parameters = self.gradient(model, create_graph=True)

            def product(v: Any) -> Any:
                vector = torch.as_tensor(np.asarray(v).reshape(-1), dtype=g.dtype, device=g.device)
                found = torch.autograd.grad(g, parameters, vector, retain_graph=True, allow_unused=True)
                parts = [torch.zeros_like(p) if h is None else h for h, p in zip(found, parameters, strict=True)]
                return torch.cat([h.flatten() for h in parts]).double().cpu().numpy()

            shape = (len(g), len(g))
            start = np.random.default_rng(0).normal(size=len(g))
            hessian = LinearOperator(shape, matvec=product, dtype=np.float64)
            largest = eigsh(hessian, k=1, which="LA", v0=start, tol=1e-2, ncv=10, maxiter=restarts)[0][0]
        except (RuntimeError, ArpackNoConvergence) as error:
            return {"sharpness": None, "sharpness_missing": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        finally:
            model.train()
        return {"sharpness": float(largest)}
