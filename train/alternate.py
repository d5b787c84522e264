"""Train router and experts in turns: rounds of router steps (backbone frozen) and expert steps (router frozen).

readme-jax alternate --config configs/quickstart/alternate.yaml --model runs/carved --data runs/data --out runs/tuned

In: a carved model and packed text. Out: a model folder with tuned weights and router, and metrics.jsonl. Interrupted
at any moment, the same command goes on from the last checkpoint, bit for bit.
"""

import collections
import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import artifacts, cli, hf, optim, placement, steps
from readme_jax.alternate import AlternateConfig, RoutedBatches, ask_teacher, first_records, student_of
from readme_jax.checkpoint import Checkpoints
from readme_jax.config import ConfigError, require
from readme_jax.data import Batches, open_records
from readme_jax.losses import HeadLoss, TopK
from readme_jax.metrics import Metrics, Stopwatch, peak_memory_gb, progress
from readme_jax.models import backbone, parallel, router
from readme_jax.models.experts import make_table
from readme_jax.sharding import batch_devices, model_devices, put, spec, use_mesh

MICRO = jax.P(None, *spec("batch", "seq"))


def main(argv: list[str] | None = None) -> None:
    """Train once; a finished folder of the same config and inputs is left as it is."""
    config: AlternateConfig = cli.parse(AlternateConfig, argv, __doc__ or "", prog="readme-jax alternate")
    parents = {"model": config.model, "data": config.data}
    if artifacts.finished(config.out, "alternate", config, parents):
        print(f"tuned model: {config.out} (already there)")
        return
    pace = config.checkpoint
    with use_mesh(config.mesh), artifacts.building(config.out, "alternate", config, parents) as work:
        with contextlib.closing(Checkpoints(work.path / "checkpoints", pace.keep, pace.keep_best)) as checkpoints:
            train(config, work, checkpoints)
    print(f"tuned model: {config.out}")


def train(config: AlternateConfig, work: artifacts.Work, checkpoints: Checkpoints) -> None:
    """The run: data, model, steps, resume, loop, result."""
    # ---- data
    cfg, experts, router_cfg = hf.read_config(config.model)
    backbone.param_specs(cfg)  # what the mesh cannot split is refused before any work
    records = open_records(config.data, "train", cfg.vocab)
    weights = {n: d["weight"] for n, d in artifacts.read_manifest(config.data)["config"]["domains"].items()}
    plan = {"router": config.router, "experts": config.experts}
    for name, phase in plan.items():
        fits = phase.batch % batch_devices() == 0 or not phase.steps
        require(fits, f"{name}.batch={phase.batch} must be a multiple of the mesh's {batch_devices()} batch devices")
    pools = {"router": first_records(records, config.router.records), "experts": records}
    batches = {
        name: Batches(pools[name], weights, batch=p.batch, accum=p.accum, seed=config.seed + i)
        for i, (name, p) in enumerate(plan.items())
    }
    way, one_device = config.experts.way, batch_devices() * model_devices() == 1
    require(one_device or way != "grouped", "experts.way=grouped runs on one device: set mesh.data=1")
    # ---- model
    if experts is None:
        raise ConfigError(f"model={config.model} is not carved; run `readme-jax carve` first")
    alone = experts.experts == 1
    require(
        not alone or config.router.steps == 0, "router.steps must be 0 for a model with one expert: there is no choice"
    )
    tied = experts.storage == "tied"
    require(tied or config.experts.kd_weight == 0, "kd_weight needs the dense teacher, which separate storage has not")
    require(tied or config.router.steps == 0, "router.steps needs labels of a dense run; separate storage has none")
    require(not tied or way != "parallel", "experts.way=parallel needs separate experts: `readme-jax separate`")
    specs, shapes = backbone.param_specs(cfg), None
    if way == "parallel":
        specs, shapes = parallel.separate_specs(specs), backbone.abstract_params(cfg)
        shapes = parallel.separate_layout(shapes, experts.experts)
    kind = jnp.dtype(config.loaded)
    model, table_LEC, _ = placement.load_sharded(config.model, specs, dtype=kind, shapes=shapes)
    _, router_params = placement.load_router(config.model, dtype=np.float32)
    assert table_LEC is not None
    table = make_table(table_LEC, cfg.mlp)
    if not alone and router_params is None:
        require(config.router.steps > 0, f"model={config.model} has no router and router.steps is 0")
        router_cfg = config.router.shape
        embedding_VD = hf.read_top(hf.Reader(config.model), cfg)["embedding"]  # mapped: its first columns are read
        fresh = router.init_params(router_cfg, embedding_VD, experts.experts, config.seed)
        router_params = jax.tree.map(put, fresh)
    # ---- what the frozen model says, once; where nothing asks it any more, the student takes its place
    dtype = jnp.dtype(config.dtype)
    label = steps.make_label(cfg, config.router.labels, dtype)
    top_k = steps.make_top_k(cfg, config.experts.teacher_topk, config.experts.head_chunk, dtype)
    teacher = optim.cast(model, config.experts.teacher_dtype) if config.asks_teacher else {}
    said = functools.partial(label, teacher, table), functools.partial(top_k, teacher)
    caches = ask_teacher(config, work.path, batches, (cfg.vocab, experts.experts), *said)
    del said
    teacher = teacher if config.experts.teacher else {}
    student, frozen = student_of(model, teacher, config.experts)
    del model
    tx = {n: optim.make(p.optim, p.steps, config.seed + i) for i, (n, p) in enumerate(plan.items())}
    phases = {"experts": steps.start(student, tx["experts"])}
    del student
    if router_params is not None and not alone:
        router_params = optim.cast(router.place(router_params), config.router.optim.params)
        phases["router"] = steps.start(router_params, tx["router"])
    # ---- steps
    head = HeadLoss(config.experts.kd_weight, config.experts.ce_weight, config.experts.head_chunk)
    expert_step = steps.make_expert_step(cfg, head, tx["experts"], dtype=dtype, remat=config.experts.remat)
    router_step = route = None
    if router_cfg is not None:
        router_step = steps.make_router_step(router_cfg, cfg.rope_theta, tx["router"])
        route = steps.make_route(router_cfg, cfg.rope_theta)
    # ---- resume
    pace = config.checkpoint
    tick = resumed = checkpoints.find(pace.resume) or 0
    recent = collections.deque(maxlen=pace.window)  # expert losses, by which `keep_best` ranks
    if tick:
        phases = checkpoints.restore(tick, phases)
        print(f"resumed at step {tick} of {config.total}")
    metrics = Metrics(work.path / "metrics.jsonl", tick, work.path / "tensorboard" if config.tensorboard else None)
    # ---- loop
    start, last_save, pending = Stopwatch(), Stopwatch(), None
    tokens = {name: p.batch * p.accum * batches[name].seq for name, p in plan.items()}
    bars = {}

    def place(batch: dict) -> dict:
        return {key: put(batch[key], MICRO) for key in ("ids", "segments")}

    def place_experts(number: int) -> dict:
        batch = batches["experts"][number]
        placed = place(batch)
        if "top_k" in caches:
            rows = caches["top_k"][batch["index"]].items()
            placed["teacher"] = TopK(**{field: put(array, MICRO) for field, array in rows})
        return placed

    routed = RoutedBatches(place_experts, route, experts.experts, way)
    spent = {"router": 0.0, "experts": 0.0}
    while tick < config.total:
        name, number = config.at(tick)
        began = start.seconds
        if name not in bars:
            whole, taken = (n * tokens[name] for n in (plan[name].steps * config.rounds, number))
            bars[name] = progress(whole, name, initial=taken)
        if name == "router":
            assert router_step is not None
            batch = batches[name][number]
            placed = place(batch)
            if "labels" in caches:
                target = caches["labels"][batch["index"]]["target"]
            else:
                current = steps.join(phases["experts"].params, frozen)
                pairs = zip(placed["ids"], placed["segments"])
                target = np.stack([np.asarray(label(current, table, *pair)) for pair in pairs])
            placed["target"] = put(target, jax.P(*MICRO, None))
            phases["router"], values = router_step(phases["router"], placed)
        else:
            chooser = phases["router"].params if route is not None else None
            placed = routed.take(number, chooser, last=config.ends_phase(tick))
            phases["experts"], values = expert_step(phases["experts"], frozen, teacher or None, table, placed)
        # the step before is logged while this one runs: the loop never waits for the device
        _log(metrics, bars, recent, pending)
        pending = (tick, name, values)
        tick += 1
        due = config.ends_phase(tick - 1) or (pace.steps and tick % pace.steps == 0)
        if due or (pace.minutes and last_save.seconds > 60 * pace.minutes):
            _log(metrics, bars, recent, pending)
            pending = None
            checkpoints.save(tick, phases, float(np.mean(recent)) if recent else None)
            last_save = Stopwatch()
        bars[name].update(tokens[name])
        spent[name] += start.seconds - began
    for bar in bars.values():
        bar.close()
    metrics.close()
    # ---- result
    work.scratch += [name for cache in caches.values() for name in cache.files]
    write(config, work, steps.join(phases["experts"].params, frozen), experts, table_LEC, router_cfg, phases)
    ran = {name: plan[name].steps * config.rounds * tokens[name] for name in plan}
    work.info |= {
        "tokens": ran,
        "seconds": start.seconds,
        "tokens_per_s": {n: (ran[n] / spent[n] if spent[n] and not resumed else None) for n in ran},
        "peak_memory_gb": peak_memory_gb(),
    }


def _log(metrics: Metrics, bars, recent: collections.deque, pending) -> None:
    if pending is None:
        return
    tick, name, values = pending
    values = {f"{name}/{key}": float(value) for key, value in values.items()}
    metrics.log(tick, values)
    if name == "experts":
        recent.append(values["experts/loss"])
    bars[name].set_postfix_str(f"loss {values[f'{name}/loss']:.3f}", refresh=False)


def write(config: AlternateConfig, work: artifacts.Work, params, experts, table_LEC, router_cfg, phases) -> None:
    """The tuned model folder in place of the training state."""
    cfg, _, _ = hf.read_config(config.model)
    base = json.loads((config.model / "config.json").read_text())
    router_params = phases["router"].params if router_cfg is not None else None
    placement.save_sharded(work.path, cfg, params, experts=table_LEC, router=router_params)
    hf_config = hf.config_to_hf(cfg, base, experts=experts, router=router_cfg, dtype=config.experts.optim.params)
    artifacts.write_text(work.path / "config.json", json.dumps(hf_config, indent=2) + "\n")
    hf.copy_side_files(config.model, work.path)
    work.scratch.append("checkpoints")


if __name__ == "__main__":
    cli.run(main)
