"""The curves of a run as one picture."""

from __future__ import annotations

from pathlib import Path

from .run import read_log


def plot(train: Path, validation: Path | None, to: Path) -> None:
    """Loss, learning rate and, where there was one, the recall of every evaluation, over steps (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log, measured = read_log(train), read_log(validation) if validation else {}
    figure, axes = pyplot.subplots(1, 2 + bool(measured), figsize=(5 * (2 + bool(measured)), 3.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "lr"), strict=False):
        axis.plot(log.get("step", []), log.get(name, []), linewidth=0.8)
        axis.set_ylabel(name)
    for name in [name for name in measured if name != "step"]:
        axes[-1].plot(measured["step"], measured[name], marker=".", label=name)
    if measured:
        axes[-1].set_ylabel("%")
        axes[-1].legend(fontsize=6)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(to, dpi=110)
    pyplot.close(figure)
