"""A study for people: study.md with its tables, and pictures of the loss over the dense model's. Pictures need the
extra `plot`."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from readme_jax import artifacts
from readme_jax.config import require
from readme_jax.serving.plots import COLOURS
from readme_jax.study_result import KINDS


def check() -> None:
    """ConfigError when pictures cannot be drawn: before hours of work, not after them."""
    there = importlib.util.find_spec("matplotlib") is not None
    require(there, "study: matplotlib is not installed; pip install 'readme-jax[plot]'")


def write(study: dict[str, Any], out: Path) -> None:
    """study.json, study.md, excess.png and domains.png of a study so far (`study_result.collect`) into a folder."""
    artifacts.write_text(out / "study.json", json.dumps(study, indent=1) + "\n")
    artifacts.write_text(out / "study.md", page(study))
    draw_excess(study, out / "excess.png")
    draw_domains(study, out / "domains.png")


def counts(study: dict[str, Any]) -> list[str]:
    """Numbers of tuned tokens for which anything is there, ascending."""
    return sorted({count for recipe in study["recipes"].values() for count in recipe}, key=int)


def entries(study: dict[str, Any], count: str) -> dict[str, dict[str, Any]]:
    """Figures by recipe at one number of tuned tokens, those that are there."""
    return {name: recipe[count] for name, recipe in recipes(study).items() if count in recipe}


def recipes(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures by recipe; the default, which study.json has under `default` too, once."""
    named = study["default"]
    return {name: own for name, own in study["recipes"].items() if name != "default" or named == "default"}


# ---- tables -----------------------------------------------------------------------------------


def page(study: dict[str, Any]) -> str:
    """study.md."""
    dense, jobs = study["dense"], study["jobs"]
    config = study["config"]
    text = [
        f"# Study of {config['model']}",
        "",
        f"{jobs['done']} of {jobs['of']} runs. Held-out loss in nats per token, mean over {len(dense['by_domain'])} "
        f"domains ({dense['tokens']} tokens); the dense model has {dense['loss']:.4f}. ln R: loss over the dense "
        "model's. Gap: how far below `static` at equal tokens, and below the best recipe of one mask. Brackets: 95 % "
        f"intervals, bootstrap over records, paired. Default: {study['default']}.",
        "",
    ]
    untuned = study["recipes"]["static"].get("0", {}).get("excess")
    for count in counts(study):
        found = entries(study, count)
        text += [f"## {_tokens(count)}", "", *quality_table(found, untuned), ""]
        if any("seeds" in entry for entry in found.values()):
            text += ["Over seeds:", "", *seeds_table(found), ""]
        text += ["ln R by domain:", "", *domain_table(found, dense["by_domain"], lambda entry: entry), ""]
        if "unseen" in dense:
            text += [
                f"Domains that took no part in calibration and tuning (dense {dense['unseen']['loss']:.4f}):",
                "",
                *unseen_table(found, dense["unseen"]["by_domain"]),
                "",
            ]
        text += ["Cost, from calibration on:", "", *cost_table(found), ""]
    text += ["![loss over the dense model's against tuned tokens](excess.png)", "", "![by domain](domains.png)", ""]
    return "\n".join(text)


def _tokens(count: str) -> str:
    return "Untuned" if count == "0" else f"After {int(count):,} tuned tokens"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a markdown table, numbers to the right."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def number(value: float | None, form: str = ".3f") -> str:
    """A figure, a dash where there is none."""
    return "-" if value is None else format(value, form)


def with_ci(value: float | None, ci: list[float] | None) -> str:
    """A figure with its interval."""
    return number(value) + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if value is not None and ci else "")


def quality_table(found: dict[str, dict[str, Any]], untuned: float | None) -> list[str]:
    """Loss, gap and routing of each recipe; untuned: ln R of the untuned static mask."""
    paper = found.get("paper", {}).get("excess")
    rows = []
    for name, e in found.items():
        cells = [name, number(e["loss"], ".4f"), number(e["r"], ".2f"), with_ci(e["excess"], e["ci"])]
        cells += [number(e["excess"] / base if base else None, ".2f") for base in (untuned, paper)]
        cells += [with_ci(e.get("static_gap"), e.get("static_gap_ci")), number(e.get("best_static_gap"))]
        cells += [number(e.get("regret")), number(e.get("choice_cost"))]
        cells += [number(e["load_max_over_mean"], ".2f"), number(e["entropy"], ".2f")]
        cells += [number(e["keeps_previous"], ".0%")]
        rows.append(cells)
    head = [
        "recipe",
        "loss",
        "R",
        "ln R",
        "/ untuned static's",
        "/ paper's",
        "gap to static",
        "to best one mask",
        "regret",
        "one choice costs",
    ]
    return table([*head, "load max/mean", "entropy", "keeps expert"], rows)


def seeds_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Loss and gap of the recipes that ran with several seeds."""
    rows = []
    for name, first in found.items():
        if "seeds" in first:
            for e in (first, *first["seeds"].values()):
                gap = with_ci(e.get("static_gap"), e.get("static_gap_ci"))
                rows.append([name, str(e["seed"]), number(e["loss"], ".4f"), with_ci(e["excess"], e["ci"]), gap])
    return table(["recipe", "seed", "loss", "ln R", "gap to static"], rows)


def domain_table(found: dict[str, dict[str, Any]], domains: dict[str, float], part) -> list[str]:
    """ln R by domain; the dense model's loss in the first row."""
    rows = [["dense, loss", *(number(loss) for loss in domains.values())]]
    for name, entry in found.items():
        by = part(entry)["by_domain"]
        rows.append([name, *(with_ci(by[d]["excess"], by[d]["ci"]) for d in domains)])
    return table(["recipe", *domains], rows)


def unseen_table(found: dict[str, dict[str, Any]], domains: dict[str, float]) -> list[str]:
    """The same on unseen domains, their mean and the gap to static beside it."""
    lines = domain_table(found, domains, lambda entry: entry["unseen"])
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    more = [["", ""]]
    for entry in found.values():
        own = entry["unseen"]
        gap = with_ci(own.get("static_gap"), own.get("static_gap_ci"))
        more.append([with_ci(own["excess"], own["ci"]), gap])
    return table(["recipe", *domains, "mean", "gap to static"], [[*row, *extra] for row, extra in zip(rows, more)])


def cost_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Tokens by kind, FLOPs, seconds and memory of each recipe."""
    rows = []
    for name, entry in found.items():
        cost = entry["cost"]
        cells = [name, *(f"{cost['tokens'][kind]:,}" for kind in KINDS)]
        cells += [f"{cost['flops']:.2e}", f"{cost['seconds']:.0f}", number(cost["peak_memory_gb"], ".1f")]
        rows.append(cells)
    head = ["recipe", "calibration", "labels", "router, with repeats", "masks", "experts", "FLOPs", "seconds"]
    return table([*head, "peak GB"], rows)


# ---- pictures ---------------------------------------------------------------------------------


def _figure(width: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _style(index: int, name: str) -> dict[str, Any]:
    line = {"static": "--", "paper": ":"}.get(name, "-" if index < len(COLOURS) else "-.")
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": line, "marker": "osv^D"[index // len(COLOURS) % 5]}


def draw_excess(study: dict[str, Any], path: Path) -> None:
    """ln R against tuned tokens, one line a recipe, intervals as bars; the dense model is the line at 0."""
    figure, axes = _figure(8)
    tuned = {name: own for name, own in recipes(study).items() if len(own) > 1}  # untuned, many are the same point
    for i, (name, recipe) in enumerate((tuned or recipes(study)).items()):
        points = sorted((int(count), entry["excess"], entry["ci"]) for count, entry in recipe.items())
        if not points:
            continue
        x, y = [p[0] for p in points], [p[1] for p in points]
        bars = None
        if all(p[2] for p in points):
            bars = np.abs(np.array([p[2] for p in points]).T - np.array(y))
        axes.errorbar(x, y, yerr=bars, label=name, capsize=3, markersize=4, **_style(i, name))
    axes.set(xlabel="tuned tokens", ylabel="loss over the dense model's, nats (ln R)")
    axes.axhline(0, color="black", linewidth=1)
    axes.grid(alpha=0.3)
    if study["recipes"]:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)


def draw_domains(study: dict[str, Any], path: Path) -> None:
    """ln R by domain at the largest number of tuned tokens that is there, unseen domains to the right."""
    figure, axes = _figure(11)
    there = counts(study)
    found = entries(study, there[-1]) if there else {}
    dense = study["dense"]
    seen, unseen = list(dense["by_domain"]), list(dense.get("unseen", {}).get("by_domain", {}))
    width = 0.8 / max(len(found), 1)
    for i, (name, entry) in enumerate(found.items()):
        by = {**entry["by_domain"], **entry.get("unseen", {}).get("by_domain", {})}
        heights = [by[d]["excess"] for d in (*seen, *unseen)]
        color = COLOURS[i % len(COLOURS)]
        hatch = "//" if i >= len(COLOURS) else None
        axes.bar(np.arange(len(heights)) + i * width, heights, width, label=name, color=color, hatch=hatch)
    middle = np.arange(len(seen) + len(unseen)) + (0.8 - width) / 2
    axes.set_xticks(middle, [*seen, *(f"{d}\n(unseen)" for d in unseen)])
    axes.set(ylabel="ln R", title=_tokens(there[-1]) if there else "")
    axes.grid(alpha=0.3, axis="y")
    if found:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
