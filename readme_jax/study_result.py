"""The result of a study: what its finished stages measured and cost, in one dict that study.json holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from readme_jax import artifacts, flops, hf
from readme_jax.carve import EXPERTS
from readme_jax.config import ModelConfig, to_dict
from readme_jax.study import Job, Recipe, Rows, Stage, StudyConfig, difference, mean_loss, quality

KINDS = ("calibration", "labels", "router", "masks", "experts")  # of tokens
ONE_EXPERT = {"load_max_over_mean": 1.0, "entropy": 0.0, "keeps_previous": 1.0}  # one choice for every token
NO_REGRET = {"regret": 0.0, "choice_cost": 0.0}  # of which no oracle knows a better one


def collect(config: StudyConfig, recipes: dict[str, Recipe], jobs: list[Job], dense: dict[str, Stage]) -> dict:
    """The study so far: jobs that have not finished are simply not there.

    Keys: config, default, dense, options (of each recipe) and recipes.NAME.TOKENS, the first seed's figures; `seeds`
    in it holds those of the others, `best_static_gap` the distance to the best recipe of one expert at these tokens.
    The default recipe is there under its name and as `default`. Losses in nats per token, mean over domains; see
    `study.quality`.
    """
    timings = read_timings(config.out)
    plain = {name: read_rows(stage)["dense"] for name, stage in dense.items()}
    done = [job for job in jobs if job.finished]
    static = {(job.tokens, job.seed): job for job in done if job.recipe == "static"}
    masks = {job.recipe for job in done if recipes[job.recipe].router is None}  # the recipes of one expert
    best: dict[tuple[int, int], float] = {}
    for job in done:
        if job.recipe in masks:
            loss = mean_loss(read_rows(job.evaluations["test"])["routed"])[0]
            best[job.tokens, job.seed] = min(loss, best.get((job.tokens, job.seed), loss))
    found: dict[str, dict[str, Any]] = {name: {} for name in recipes}
    for job in done:
        beside = static.get((job.tokens, job.seed))
        entry = figures(job, plain, beside) | {"seed": job.seed, "cost": cost(config, job, timings)}
        if (job.tokens, job.seed) in best:
            entry["best_static_gap"] = best[job.tokens, job.seed] - entry["loss"]
        entry["stages"] = [stage.key for stage in [*job.stages, *job.evaluations.values()]]
        counts = found[job.recipe]
        if job.seed == config.seeds[0]:
            counts[str(job.tokens)] = entry
        elif str(job.tokens) in counts:
            counts[str(job.tokens)].setdefault("seeds", {})[str(job.seed)] = entry
    loss, by = mean_loss(plain["test"])
    whole: dict[str, Any] = {"loss": loss, "by_domain": by, "tokens": test_tokens(plain["test"])}
    if "unseen" in plain:
        loss, by = mean_loss(plain["unseen"])
        whole["unseen"] = {"loss": loss, "by_domain": by, "tokens": test_tokens(plain["unseen"])}
    ordered = {name: dict(sorted(counts.items(), key=lambda own: int(own[0]))) for name, counts in found.items()}
    return {
        "config": to_dict(config),
        "versions": artifacts.versions(),
        "jobs": {"done": len(done), "of": len(jobs)},
        "default": config.default,
        "dense": whole,
        "options": {name: {k: v for k, v in to_dict(r).items() if v is not None} for name, r in recipes.items()},
        "recipes": {"default": ordered[config.default]} | ordered,
    }


def figures(job: Job, dense: dict[str, Rows], static: Job | None) -> dict[str, Any]:
    """Losses and routing of one job. `regret`: its loss over that with the choice an oracle takes for each token,
    `choice_cost`: what one choice for all layers costs the oracle; both where `bounds` asked for these arms and ran."""
    entry: dict[str, Any] = {}
    for name, stage in job.evaluations.items():
        rows = read_rows(stage)
        other = None if static is None else read_rows(static.evaluations[name])["routed"]
        own = quality(rows["routed"], dense[name], other)
        if name == "unseen":
            entry["unseen"] = own
            continue
        entry |= own
        bound = read_rows(job.bounds) if job.bounds is not None and job.bounds.finished else {}
        if "oracle" in bound:
            entry["regret"] = difference(rows["routed"], bound["oracle"])["mean"]
        if "oracle" in bound and "oracle_layers" in bound:
            entry["choice_cost"] = difference(bound["oracle"], bound["oracle_layers"])["mean"]
        routing = json.loads((stage.folder / "evaluation.json").read_text())["routing"]
        entry |= {key: (routing or ONE_EXPERT)[key] for key in ONE_EXPERT} | ({} if routing else NO_REGRET)
    return entry


def read_rows(stage: Stage) -> dict[str, Rows]:
    """Loss sums and tokens of every record, by arm and domain."""
    return json.loads((stage.folder / "evaluation.json").read_text())["records"]


def test_tokens(rows: Rows) -> int:
    """Tokens whose loss is counted."""
    return int(sum(sum(own["tokens"]) for own in rows.values()))


# ---- cost -------------------------------------------------------------------------------------


def read_timings(out: Path) -> dict[str, dict[str, float]]:
    """seconds and peak_memory_gb of the stages that were run, by key, over all starts."""
    path = out / "stages.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def cost(config: StudyConfig, job: Job, timings: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What a recipe cost from calibration on, evaluation not counted: tokens by kind, FLOPs of the matrix
    multiplications, seconds on this machine and peak memory (of a stage in common, in every recipe that needs it)."""
    cfg, _, _ = hf.read_config(config.out / "dense")
    seq = config.data.seq
    tokens, work = dict.fromkeys(KINDS, 0), 0.0
    for stage in job.stages:
        spent, own = stage_cost(config.out, stage, cfg, seq)
        tokens = {kind: count + spent.get(kind, 0) for kind, count in tokens.items()}
        work += own
    timed = [timings[stage.key] for stage in job.stages if stage.key in timings]
    return {
        "tokens": tokens,
        "flops": work,
        "seconds": sum(entry["seconds"] for entry in timed),
        "peak_memory_gb": max((entry["peak_memory_gb"] for entry in timed), default=None),
    }


def stage_cost(out: Path, stage: Stage, cfg: ModelConfig, seq: int) -> tuple[dict[str, int], float]:
    """(tokens by kind, FLOPs) of one finished stage."""
    if stage.program == "carve":
        return {}, 0.0
    ran = artifacts.read_manifest(stage.folder)["info"]["tokens"]
    if stage.program == "calibrate":
        return {"calibration": ran}, ran * flops.layers(cfg, seq, cfg.mlp).total
    if stage.program == "masks":
        return {"masks": ran}, ran * flops.mask_step_flops(cfg, seq)
    _, experts, router = hf.read_config(stage.folder)
    assert experts is not None
    used = max(len(np.unique(table_EC)) for table_EC in hf.Reader(stage.folder).get(EXPERTS))
    row = seq // stage.config.experts.cut
    phases = {"router": (stage.config.router, seq), "experts": (stage.config.experts, row)}
    own = {
        name: flops.train_flops_per_token(cfg, experts, phase, length, router=router, used=used)
        for name, (phase, length) in phases.items()
        if ran[name]
    }
    spent = {**ran, "labels": labelled(out, stage, seq)}
    work = sum(ran[name] * own[name] for name in own) + spent["labels"] * flops.label_flops(cfg, experts.experts, seq)
    if (phase := stage.config.experts).refit:
        spent["calibration"] = phase.refit * phase.batch * phase.accum * row
        work += spent["calibration"] * flops.refit_flops(cfg, row, used)
    if stage.config.experts.teacher_topk and ran["experts"]:  # asked once, before training
        work += ran["experts"] * (flops.layers(cfg, row, cfg.mlp).total + flops.head_flops(cfg))
    return spent, work


def labelled(out: Path, stage: Stage, seq: int) -> int:
    """Tokens that the dense model labelled for the router, once (`teacher: current` labels within its steps)."""
    if not stage.config.labelled:
        return 0
    there = [entry["train"]["records"] for entry in artifacts.read_manifest(out / "data")["info"]["domains"].values()]
    each = -(-stage.config.router.records // len(there)) or max(there)
    return seq * sum(min(each, count) for count in there)
