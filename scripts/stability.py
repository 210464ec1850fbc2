"""Draw where elastic averaging is stable: by the formulas, and by the package's rule itself.

python scripts/stability.py                           outputs/gallery/stability.png, in seconds
python scripts/stability.py --picture FILE.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from presenting import style

from lightning_easgd import EASGD
from lightning_easgd.algorithms import elastic

ETA = 1e-3
"""η of the paper's figure 1, with curvature 1."""
_MARGIN = 1e-9
"""A spectral radius of 1 up to rounding counts as stable: what does not grow."""


def is_stable(workers: int, step: float, alpha: float) -> bool:
    """Whether synchronous EASGD is, at τ = 1.

    Args:
        workers: p.
        step: ηh, the learning rate times the curvature.
        alpha: α.
    """
    beta = workers * alpha
    return (2 - step) * (2 - beta) > 2 * alpha and (2 - step) + (2 - beta) > alpha


def stable_in_turn(step: float, alpha: float) -> bool:
    """Whether EASGD is with workers that come in turn, for any number of them."""
    return 0 <= step <= 2 and 0 <= alpha <= (4 - 2 * step) / (4 - step)


def together(workers: int, step: float, alpha: float) -> np.ndarray:
    """The linear map of one step of all workers, by the package's rule."""
    x, center = _basis(workers)
    pulls = _pulls(x, center, alpha)
    x = x - step * x - torch.stack(pulls)
    EASGD().move_(center, torch.stack(pulls).sum(dim=0), {})
    return torch.cat([x, center[None]]).numpy()


def in_turn(workers: int, step: float, alpha: float) -> np.ndarray:
    """The linear map of a step of one worker after the other, by the package's rule."""
    x, center = _basis(workers)
    for worker in x:
        (pull,) = _pulls(worker[None], center, alpha)
        worker.sub_(step * worker + pull)
        EASGD().move_(center, pull, {})
    return torch.cat([x, center[None]]).numpy()


def in_turn_by_formula(workers: int, step: float, alpha: float) -> np.ndarray:
    """The same in one line per worker, without the package."""
    state = np.eye(workers + 1)
    for i in range(workers):
        pull = alpha * (state[i] - state[-1])
        state[i], state[-1] = (1 - step) * state[i] - pull, state[-1] + pull
    return state


def admm(workers: int, step: float, alpha: float) -> np.ndarray:
    """The linear map of one round of ADMM with workers in turn; α = ηρ."""
    state = np.eye(2 * workers + 1)
    x, multipliers = state[:workers], state[workers:-1]
    for i in range(workers):
        multipliers[i] -= x[i] - state[-1]
        x[i] = (x[i] - step * x[i] + alpha * (multipliers[i] + state[-1])) / (1 + alpha)
        state[-1] = (x - multipliers).mean(axis=0)
    return state


def radius(linear_map: np.ndarray) -> float:
    """The spectral radius: by what the slowest direction shrinks or grows in a step."""
    return float(np.abs(np.linalg.eigvals(linear_map)).max())


def grid(number: int, stop: float) -> np.ndarray:
    """Values from near 0 to a stop."""
    return np.linspace(stop / number / 2, stop - stop / number / 2, number)


def draw(path: Path) -> None:
    """The picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.styled():
        figure = Figure(figsize=(12, 3.9), layout="constrained")
        first, second, third = figure.subplots(1, 3)
        _draw_region(first, 4, 0.6, together, lambda h, a: is_stable(4, h, a))
        first.set_title("Synchronous, 4 workers")
        _draw_region(second, 4, 1.2, in_turn, stable_in_turn)
        second.set_title("Workers in turn at a center, any number")
        draw_radii(third)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(path)


def _basis(workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Workers and center, each as a combination of all of their starts."""
    state = torch.eye(workers + 1, dtype=torch.float64)
    return state[:-1].clone(), state[-1].clone()


def _pulls(x: torch.Tensor, center: torch.Tensor, alpha: float) -> list[torch.Tensor]:
    """α (x - c) of each worker."""
    pulls = [torch.empty_like(center) for _ in x]
    elastic.difference([*x], [center] * len(x), out=pulls)
    elastic.scale_(pulls, [alpha] * len(x))
    return pulls


def _draw_region(
    axes: Any,
    workers: int,
    highest: float,
    rule: Callable[[int, float, float], np.ndarray],
    formula: Callable[[float, float], bool],
) -> None:
    steps, alphas = np.linspace(0, 2.2, 331), np.linspace(0, highest, 301)
    inside = np.array([[formula(h, a) for h in steps] for a in alphas], float)
    axes.contourf(steps, alphas, inside, levels=[0.5, 1.5], colors=["#56b4e9"], alpha=0.35)
    axes.contour(steps, alphas, inside, levels=[0.5], colors=["#0072b2"], linewidths=1.5)
    points = [(h, a) for h in grid(16, 2.2) for a in grid(14, highest)]
    stable = [radius(rule(workers, *point)) <= 1 + _MARGIN for point in points]
    for kind, mark, label in ((True, "o", "stable"), (False, "x", "diverges")):
        chosen = [point for point, is_so in zip(points, stable, strict=True) if is_so == kind]
        look = {"color": style.INK if kind else "#d55e00", "linestyle": "none", "markersize": 3}
        axes.plot(*zip(*chosen, strict=True), mark, label=f"package's rule: {label}", **look)
    axes.plot([], [], color="#0072b2", label="border by the formula")
    axes.set_xlabel("ηh, learning rate × curvature")
    axes.set_ylabel("α")
    axes.grid(visible=False)
    _legend(axes)


def draw_radii(axes: Any) -> None:
    """The paper's figure 1, for one learning rate."""
    rhos, few = np.linspace(0, 10, 101), np.linspace(0.5, 10, 9)
    for workers, dash in ((3, "-"), (8, "--")):
        curves: Sequence[tuple[str, str, Any]] = (
            ("ADMM", "#d55e00", admm),
            ("EASGD", "#0072b2", in_turn_by_formula),
        )
        for name, colour, rule in curves:
            axes.plot(
                rhos,
                _excess(rule, workers, rhos),
                dash,
                color=colour,
                label=f"{name}, {workers} workers, by the formula",
            )
        axes.plot(
            few,
            _excess(in_turn, workers, few),
            "o" if workers == 3 else "^",
            color=style.INK,
            label=f"EASGD, {workers} workers, the package's rule",
        )
    axes.axhline(0, color=style.INK, linewidth=0.8)
    axes.set_title(f"Workers in turn, ηh = {ETA:g}; above 0 it diverges")
    axes.set_xlabel("ρ = α/η")
    axes.set_ylabel("(spectral radius of a round − 1) × 1000")
    _legend(axes)


def _excess(rule: Any, workers: int, rhos: np.ndarray) -> list[float]:
    return [1e3 * (radius(rule(workers, ETA, ETA * rho)) - 1) for rho in rhos]


def _legend(axes: Any) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize="x-small")


def main() -> None:
    """Parse the command line, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("outputs/gallery/stability.png")
    parser.add_argument("--picture", type=Path, default=default, help=f"default: {default}")
    picture = parser.parse_args().picture
    draw(picture)
    print(f"  {picture}")


if __name__ == "__main__":
    main()
