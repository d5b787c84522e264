"""Pictures of served traces: latency, memory, and what moves while what computes. Needs the extra `plot`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from readme_jax.config import require
from readme_jax.serving.link import Transfer

# Okabe and Ito's colours, distinct for colour-blind readers as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def _figure(width: float = 7.0, height: float = 4.2):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        require(False, "plots: matplotlib is not installed; pip install 'readme-jax[plot]'")
        raise
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def latency_cdf(path: Path, seconds: Mapping[str, Sequence[float] | np.ndarray], title: str) -> None:
    """Share of requests answered within a time, one curve a way of serving. seconds: end-to-end latencies."""
    figure, axes = _figure()
    for i, (name, values) in enumerate(seconds.items()):
        values = np.sort(values)
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=name, color=_colour(i))
    axes.set(xscale="log", xlabel="end-to-end latency, s", ylabel="share of requests", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def against_memory(
    path: Path, shares: Sequence[float], values: Mapping[str, Sequence[float]], label: str, title: str
) -> None:
    """One curve a way of serving over expert memory, as a share of all expert pages."""
    figure, axes = _figure()
    for i, (name, row) in enumerate(values.items()):
        axes.plot(shares, row, marker="o", label=name, color=_colour(i))
    axes.set(xlabel="expert memory / all expert pages", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def timeline(
    path: Path,
    passes: Sequence[tuple[float, float]],
    transfers: Sequence[Transfer],
    span: tuple[float, float],
    title: str,
) -> None:
    """Transfers above, compute below, over `span` seconds. passes: (start, end) of each pass on the device."""
    figure, axes = _figure(10.0, 2.6)
    begin, end = span
    rows = (
        (0.0, [(a, b) for a, b in passes], "compute", COLOURS[0]),
        (1.0, [(t.start, t.end) for t in transfers], "transfers", COLOURS[1]),
    )
    for place, bars, name, colour in rows:
        shown = [(1e3 * (a - begin), 1e3 * (b - a)) for a, b in bars if b > begin and a < end]
        axes.broken_barh(shown, (place, 0.8), facecolor=colour, edgecolor="white", linewidth=0.2, label=name)
    axes.set(xlabel="ms", yticks=[0.4, 1.4], yticklabels=["compute", "link"], title=title)
    axes.set_xlim(0, 1e3 * (end - begin))
    figure.savefig(path, dpi=150)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
