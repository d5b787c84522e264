"""How the quickstart divides its minutes, and how the results of its stages become one report."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from readme_jax import artifacts
from readme_jax.config import ArtifactError, require, to_dict
from readme_jax.metrics import read_metrics

DOMAINS = ("code", "docs", "wiki", "news", "science", "qa_math", "books")
SEQ = 512
CUT = 2  # rows of a record where experts are tuned: few tokens want many steps (docs/quality.md)
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Water boils when")
# Cost of a token in dense forward passes with head, measured on two CPU cores with SmolLM2-135M (docs/LOG.md).
LABEL_COST, ROUTER_COST, EXPERT_COST = 0.9, 0.12, 7.7
ARMS_EVALUATED = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """One quickstart."""

    out: Path = Path("runs/quickstart")
    """Folder to work in; the same command goes on where an interrupted one stopped."""
    minutes: float = 15.0
    """Time for the whole run on this machine; tokens for calibration, labels and tuning follow from it."""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Dense model: hub name, local folder or .gguf file."""
    fraction: float = 0.5
    """Share of the FFN channels that each token runs."""
    seed: int = 0
    """Seed of data order and router."""

    def __post_init__(self):
        require(0 < self.minutes < math.inf, f"minutes={self.minutes} must be positive")
        require(0 < self.fraction <= 1, f"fraction={self.fraction} must be above 0 and at most 1")
        require(0 <= self.seed < 2**32 - 1, f"seed={self.seed} must be in 0 .. 2**32 - 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens per domain, fixed before any model runs."""

    train: int
    calibration: int
    test: int


def sizes(minutes: float, accelerator: bool) -> Sizes:
    """Text to prepare per domain; more minutes or an accelerator take more."""
    scale = max(minutes / 15, 0.2) * (8 if accelerator else 1)
    return Sizes(
        train=SEQ * math.ceil(40 * scale),
        calibration=SEQ * min(math.ceil(2 * scale), 64),
        test=SEQ * min(max(math.ceil(2 * scale**0.5), 1), 16),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps of the tuning stages, from the rate seen while calibrating. Written down, so that a rerun does the same."""

    minutes: float
    seed: int
    label_records: int
    router_steps: int
    router_batch: int
    expert_steps: int
    """Of one row each, SEQ / CUT tokens."""


def make_plan(config: QuickstartConfig, sizes: Sizes, spent: float, rate: float) -> Plan:
    """Divide what is left: `spent` seconds are gone, a dense forward pass runs `rate` tokens/s.

    Set aside first: evaluation of six arms, generation, export and its check, compilation. Of the rest a fifth labels
    tokens, a fifth tunes the router on them (several epochs), three fifths tune the two models with equal tokens.
    """
    evaluation = ARMS_EVALUATED * len(DOMAINS) * sizes.test / rate
    fixed = evaluation + min(60.0 + 20_000 / rate, 0.3 * 60 * config.minutes)
    left = max(60 * config.minutes - spent - fixed, 0.15 * 60 * config.minutes)
    records = len(DOMAINS) * sizes.train // SEQ
    labels = max(min(int(0.2 * left * rate / LABEL_COST) // SEQ, records), 8)
    batch = min(8, max(labels // 8, 1))
    router_steps = int(0.2 * left * rate / (ROUTER_COST * SEQ * batch))
    # an epoch is labels / batch steps; past ten epochs the router only learns the records by heart
    router_steps = max(min(router_steps, 10 * labels // batch), 8)
    expert_steps = max(CUT * int(0.3 * left * rate / (EXPERT_COST * SEQ)), 2)
    return Plan(
        minutes=config.minutes,
        seed=config.seed,
        label_records=labels,
        router_steps=router_steps,
        router_batch=batch,
        expert_steps=expert_steps,
    )


def load_plan(path: Path, config: QuickstartConfig) -> Plan | None:
    """The plan of an earlier start in the same folder; ArtifactError when it was made for other options."""
    if not path.is_file():
        return None
    try:
        plan = Plan(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ArtifactError(f"{path}: damaged; remove it, and the run is planned anew") from None
    for name in ("minutes", "seed"):
        old, new = getattr(plan, name), getattr(config, name)
        require(
            old == new, f"out={config.out} was begun with {name}={old}, now {new}; choose another folder", ArtifactError
        )
    return plan


# ---- the report -------------------------------------------------------------------------------


def collect(config: QuickstartConfig, plan: Plan, folders: dict[str, Path], extra: dict) -> dict:
    """The dict that `report.write_report` takes, from the finished stage folders."""
    evaluations = {
        name: json.loads((folders[f"evaluate_{name}"] / "evaluation.json").read_text())
        for name in ("untuned", "static", "static_tuned", "routed_tuned")
    }
    where = {
        "dense": ("untuned", "dense"),
        "static": ("static", "routed"),
        "static_tuned": ("static_tuned", "routed"),
        "own_domain": ("untuned", "own_domain"),
        "routed": ("untuned", "routed"),
        "routed_tuned": ("routed_tuned", "routed"),
    }
    ladder = {arm: evaluations[e]["mean_loss"][key] for arm, (e, key) in where.items()}
    by_domain = {arm: evaluations[e]["arms"][key] for arm, (e, key) in where.items()}
    domains = {name: {arm: by[name]["loss"] for arm, by in by_domain.items()} for name in by_domain["dense"]}
    errors = {arm: _mean_error([e["error"] for e in by.values()]) for arm, by in by_domain.items()}
    pair = [evaluations[e]["records"]["routed"] for e in ("static_tuned", "routed_tuned")]
    errors["gain"] = _mean_error([paired_error(pair[0][name], pair[1][name]) for name in domains])
    before, routing = evaluations["untuned"]["routing"], evaluations["routed_tuned"]["routing"]
    carved = artifacts.read_manifest(folders["carved"])["info"]
    curves = {
        "static_tuned": _curve(folders["static_tuned"], "experts/loss"),
        "routed_tuned": _curve(folders["tuned"], "experts/loss"),
        "router": _curve(folders["tuned"], "router/loss"),
    }
    return {
        "model": {"name": config.model, "source": extra.pop("source")},
        "ladder": ladder,
        "domains": domains,
        "errors": {arm: error for arm, error in errors.items() if error is not None},
        "router": {
            "agreement": before["agreement"],
            "entropy": routing["entropy"],
            "keeps_previous": routing["keeps_previous"],
            "steps": plan.router_steps,
            "loss_curve": curves["router"],
        },
        "experts": {
            **{key: carved[key] for key in ("names", "channels", "mlp", "overlap", "shared_share", "union_share")},
            **{key: routing[key] for key in ("load", "load_by_domain", "load_max_over_mean")},
        },
        "curves": curves,
        "versions": artifacts.versions(),
        "config": {**to_dict(config), "plan": to_dict(plan)},
        **extra,
    }


def paired_error(first: dict, second: dict) -> float | None:
    """Standard error of the difference in token-weighted loss of two arms on the same records; None with one."""
    weight_N = np.array(first["tokens"])
    difference_N = np.array(first["loss"]) - np.array(second["loss"])
    n, total = len(weight_N), max(weight_N.sum(), 1.0)
    if n < 2:
        return None
    residual_N = difference_N - difference_N.sum() / total * weight_N
    return float(np.sqrt(n / (n - 1) * np.square(residual_N).sum()) / total)


def _mean_error(errors: list[float | None]) -> float | None:
    if None in errors:
        return None
    return float(np.linalg.norm(np.array(errors, np.float64)) / len(errors))


def _curve(folder: Path, key: str) -> list[list[float]]:
    values = [line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line]
    return [[step, value] for step, value in enumerate(values)]
