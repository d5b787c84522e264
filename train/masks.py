"""Learn which channels each expert keeps, with frozen weights, by the KL to the dense model.

readme-jax masks --model runs/routed --data runs/data --out runs/masked --steps 100

In: a carved model (with several experts, one whose router is tuned: `alternate` with experts.steps 0). Out: the same
model carved anew, the same number of channels in every expert and layer; its router is the one it came with. Tune that
again, and the experts, by `alternate`. An interrupted run goes on where it was.
"""

import collections
import functools

import jax
import numpy as np

from readme_jax import artifacts, carve, cli, distributed, hf, masks, placement, steps
from readme_jax.carve import describe
from readme_jax.checkpoint import Checkpoints
from readme_jax.config import DataError, Stopped, require
from readme_jax.data import Batches, open_records
from readme_jax.loop import Timer, place_batch
from readme_jax.masks import MasksConfig
from readme_jax.metrics import Metrics, Stopwatch, layers, peak_memory, progress
from readme_jax.models import backbone, router
from readme_jax.sharding import MeshConfig, put, spec, use_mesh


def main(argv: list[str] | None = None) -> None:
    """Learn once; a finished folder of the same config and inputs is left as it is."""
    config: MasksConfig = cli.parse(MasksConfig, argv, __doc__ or "", prog="readme-jax masks")
    parents = {"model": config.model, "data": config.data}
    if artifacts.finished(config.out, "masks", config, parents):
        print(f"model with learned experts: {config.out} (already there)")
        return
    pace = config.checkpoint
    with use_mesh(MeshConfig(data=1)), artifacts.building(config.out, "masks", config, parents) as work:
        with (
            Checkpoints(work.path / "checkpoints", pace.keep, pace.keep_best) as checkpoints,
            distributed.Stop() as stop,
        ):
            learned_LEC = learn(config, work, checkpoints, stop)
        work.info |= carve.recarve(config.model, work.path, learned_LEC, progress=lambda items: layers(items, "write"))
        work.scratch.append("checkpoints")
    print(describe(work.info))
    print(f"model with learned experts: {config.out}")


def learn(config: MasksConfig, work: artifacts.Work, checkpoints: Checkpoints, stop: distributed.Stop) -> np.ndarray:
    """The run: data, model, scores, resume, loop. Returns the expert table int32 [L, E, C] in the model's own ids."""
    # ---- data and model
    cfg, experts, router_cfg = hf.read_config(config.model)
    experts = masks.check(config, experts, router_cfg)
    records, weights = open_records(config.data, "train", cfg.vocab), artifacts.read_manifest(config.data)["config"]
    weights = {name: domain["weight"] for name, domain in weights["domains"].items()}
    batches = Batches(records, weights, batch=config.batch, accum=config.accum, seed=config.seed)
    calibration = open_records(config.data, "calibration", cfg.vocab)
    there = sum(map(len, records.values()))
    require(config.batch * config.accum <= there, f"batch={config.batch}, accum={config.accum}: only {there} records")
    for name, own in calibration.items():
        require(len(own) > 0, f"domain {name}: no calibration records", DataError)
    params, table_LEC, _ = placement.load_sharded(config.model, backbone.param_specs(cfg), dtype=np.float32)
    _, router_params = placement.load_router(config.model, dtype=np.float32)
    assert table_LEC is not None
    # ---- scores
    shares_ELF = masks.importance(cfg, params, calibration, table_LEC, experts.names)
    scores_LEF = masks.first_scores(shares_ELF, table_LEC)
    tx = masks.optimizer(config)
    phases = {"masks": steps.start(masks.begin(scores_LEF), tx)}
    tick, phases = checkpoints.resume(config.checkpoint.resume, phases)
    phase = phases["masks"]
    step = masks.make_mask_step(cfg, experts.channels, tx, config.head_chunk)
    route = None
    if experts.experts > 1 and router_cfg is not None and router_params is not None:
        route = functools.partial(steps.make_route(router_cfg, cfg.rope_theta), router.place(router_params))
    # ---- loop
    metrics, timer, watch = Metrics(work.path / "metrics.jsonl", tick), Timer(config.checkpoint.minutes), Stopwatch()
    tokens, started = config.batch * config.accum * batches.seq, tick
    kl = collections.deque(metrics.past("masks/kl"), maxlen=config.checkpoint.window)
    pending: tuple[int, dict] | None = None
    stop.leave()
    try:
        with progress(config.steps * tokens, "masks", initial=tick * tokens) as bar:

            def log(pending: tuple[int, dict] | None) -> None:
                if pending is None:
                    return
                values = {f"masks/{name}": float(value) for name, value in jax.device_get(pending[1]).items()}
                metrics.log(pending[0], values, {"time/seconds": watch.seconds})
                kl.append(values["masks/kl"])
                bar.set_postfix_str(f"KL {kl[-1]:.3f}, changed {values['masks/changed']:.2%}", refresh=False)
                bar.update(tokens)

            while tick < config.steps:
                batch = place_batch(batches, tick)
                batch["expert"] = put(np.zeros(batch["ids"].shape, np.int32), spec(None, "batch", "seq"))
                if route is not None:
                    batch["expert"] = route(batch["ids"], batch["segments"])
                phase, values = step(phase, params, batch)
                log(pending)  # the step before, while this one runs
                pending, tick = (tick, values), tick + 1
                every = config.checkpoint.steps
                if stop.asked or timer.due() or tick == config.steps or (every and tick % every == 0):
                    log(pending)
                    pending = None
                    checkpoints.save(tick, {"masks": phase}, float(np.mean(kl)))
                    work.kept = True
                    timer.restart()
                if stop.asked and tick < config.steps:
                    checkpoints.wait()
                    raise Stopped(f"stopped by {stop.asked}; saved at step {tick} of {config.steps}")
    finally:
        metrics.close()
    learned_LEC = masks.table_of(masks.whole(phase.params), experts.channels)
    same = np.mean([len(np.intersect1d(a, b)) for a, b in zip(_rows(learned_LEC), _rows(table_LEC))])
    work.info |= {"changed": 1 - float(same) / experts.channels, "tokens": config.steps * tokens, **peak_memory()}
    seconds, ran = watch.seconds, (config.steps - started) * tokens
    work.info["tokens_per_s"] = ran / seconds if ran else None  # of this start
    return learned_LEC


def _rows(table_LEC: np.ndarray) -> np.ndarray:
    return table_LEC.reshape(-1, table_LEC.shape[-1])


if __name__ == "__main__":
    cli.run(main)
