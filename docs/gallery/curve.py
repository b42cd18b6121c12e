"""A regression on a curve with a gap, and what the filter says of its uncertainty: draws docs/gallery/curve.png."""

from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.nn.functional import mse_loss

from grng import GRNG
from grng.preconditioners import Kalman

NOISE = 0.1


def main() -> None:
    torch.manual_seed(1)
    x = torch.cat([torch.rand(70, 1) * 1.2 - 2.0, torch.rand(70, 1) * 1.2 + 0.6])
    y = torch.sin(2.5 * x) + NOISE * torch.randn_like(x)
    at = torch.linspace(-4, 4, 400)[:, None]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for ax, covariance in zip(axes, ("diag", "kron"), strict=True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
        opt = GRNG(model, variant="kalman", rho=0.0, preconditioner=Kalman(covariance=covariance, gamma=0.02))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1500)
        for _ in range(1500):
            batch = torch.randint(len(x), (70,))
            opt.zero_grad()
            mse_loss(model(x[batch]), y[batch]).backward()
            opt.step()
            schedule.step()
        # The filter speaks for its last B/gamma samples; the data set has fewer.
        found = opt.posterior.linearised(at, data_size=len(x))
        mean, model_sd, sd = (t.squeeze(1) for t in (found.mean, found.model_variance.sqrt(), found.variance.sqrt()))
        ax.fill_between(
            at.squeeze(1), mean - 2 * sd, mean + 2 * sd, color="#009E73", alpha=0.18, lw=0, label="with noise"
        )
        ax.fill_between(
            at.squeeze(1),
            mean - 2 * model_sd,
            mean + 2 * model_sd,
            color="#009E73",
            alpha=0.3,
            lw=0,
            label="parameters",
        )
        ax.plot(at, mean, color="#00614A", label="mean")
        ax.plot(at, torch.sin(2.5 * at), "--", color="#999999", lw=1, label="truth")
        ax.plot(x, y, ".", color="#222222", ms=3.5, label="data")
        ax.set(
            title=f'covariance="{covariance}", noise {float(opt.posterior.noise.sqrt()):.3f}', ylim=(-3, 3), xlabel="x"
        )
        opt.close()
    axes[0].legend(loc="lower left", ncols=2, frameon=False)
    figure.suptitle("Two standard deviations")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
