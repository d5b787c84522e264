"""Train router and experts in turns: rounds of router steps (backbone frozen) and expert steps (router frozen).

readme-jax alternate --config configs/quickstart/alternate.yaml --model runs/carved --data runs/data --out runs/tuned

In: a carved model and packed text. Out: a model folder with tuned weights and router, metrics.jsonl (what was computed)
and timing.jsonl (what was measured). Interrupted at any moment, the same command goes on from the last checkpoint, bit
for bit. Asked to stop (SIGTERM, Ctrl-C) it saves itself at the next step and leaves with exit code 75; when a process
of several is lost, the others leave with 76; what nobody foresaw ends all with 70. Started once a host, the processes
find each other (see `hosts`).
"""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import artifacts, cli, distributed, flops, hf, optim, placement, steps
from readme_jax.accelerators import peak_flops
from readme_jax.alternate import (
    AlternateConfig,
    building,
    check_extras,
    check_processes,
    fresh_router,
    records_of,
    student_of,
    write,
)
from readme_jax.alternate import check as check_config
from readme_jax.checkpoint import Checkpoints
from readme_jax.config import Stopped
from readme_jax.data import Batches
from readme_jax.loop import Ahead, Profiler, Timer, Watch, place_batch
from readme_jax.losses import HeadLoss, TopK
from readme_jax.metrics import Metrics, Pace, peak_memory
from readme_jax.models import backbone, parallel, router
from readme_jax.models.experts import make_table
from readme_jax.refit import refit_phase
from readme_jax.routed import Prepared, RoutedBatches, compile_ahead, likely_batches, output
from readme_jax.sharding import use_mesh
from readme_jax.teacher import ask_teacher

SAVE, STOP = 1, 2


def main(argv: list[str] | None = None) -> None:
    """Train once; a finished folder of the same config and inputs is left as it is."""
    config: AlternateConfig = cli.parse(AlternateConfig, argv, __doc__ or "", prog="readme-jax alternate")
    parents = {"model": config.model, "data": config.data}
    with distributed.joined(config.hosts):
        check_processes(config)
        if distributed.on_main(lambda: artifacts.finished(config.out, "alternate", config, parents)):
            distributed.show(f"tuned model: {config.out} (already there)")
            return
        pace = config.checkpoint
        with use_mesh(config.mesh) as mesh, building(config, parents) as work:
            with Checkpoints(work.path / "checkpoints", pace.keep, pace.keep_best) as checkpoints:
                with distributed.Stop() as stop:
                    train(config, work, checkpoints, mesh, stop)
        distributed.show(f"tuned model: {config.out}")


def train(
    config: AlternateConfig,
    work: artifacts.Work,
    checkpoints: Checkpoints,
    mesh: jax.sharding.Mesh,
    stop: distributed.Stop,
) -> None:
    """The run: data, model, steps, resume, loop, result."""
    # ---- data
    cfg, experts, router_cfg = hf.read_config(config.model)
    backbone.param_specs(cfg)  # what the mesh cannot split is refused before any work
    experts = check_config(config, experts, cfg.vocab)
    check_extras(config)
    weights = {n: d["weight"] for n, d in artifacts.read_manifest(config.data)["config"]["domains"].items()}
    plan = {"router": config.router, "experts": config.experts}
    pools = records_of(config, cfg.vocab)
    batches = {
        name: Batches(pools[name], weights, batch=p.batch, accum=p.accum, seed=config.seed + i)
        for i, (name, p) in enumerate(plan.items())
    }
    # ---- model
    specs, shapes, alone = backbone.param_specs(cfg), None, experts.experts == 1
    if config.experts.way == "parallel":
        specs, shapes = parallel.separate_specs(specs), backbone.abstract_params(cfg)
        shapes = parallel.separate_layout(shapes, experts.experts)
    kind = jnp.dtype(config.loaded)
    model, table_LEC, _ = placement.load_sharded(config.model, specs, dtype=kind, shapes=shapes)
    _, router_params = placement.load_router(config.model, dtype=np.float32)
    assert table_LEC is not None
    table = make_table(table_LEC, cfg.mlp)
    if not alone and router_params is None:
        router_cfg, router_params = fresh_router(config, cfg, experts)
    # ---- what the frozen model says, once; where nothing asks it any more, the student takes its place
    dtype = jnp.dtype(config.dtype)
    label = steps.make_label(cfg, config.router.labels, dtype)
    top_k = steps.make_top_k(cfg, config.experts.teacher_topk, config.experts.head_chunk, dtype)
    teacher = optim.cast(model, config.experts.teacher_dtype) if config.asks_teacher else {}
    said = functools.partial(label, teacher, table), functools.partial(top_k, teacher)
    stop.leave()
    caches = ask_teacher(config, work.path, batches, (cfg.vocab, experts.experts), *said, stop=lambda: stop.asked)
    work.kept |= bool(caches)
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
    head, route = HeadLoss(config.experts.kd_weight, config.experts.ce_weight, config.experts.head_chunk), None
    made: dict[str, Callable] = {}
    made["experts"] = steps.make_expert_step(cfg, head, tx["experts"], dtype=dtype, remat=config.experts.remat)
    label_all = jax.jit(lambda params, table, *batch: jax.lax.map(lambda micro: label(params, table, *micro), batch))
    if router_cfg is not None:
        made["router"] = steps.make_router_step(router_cfg, cfg.rope_theta, tx["router"], config.router.balance)
        route = steps.make_route(router_cfg, cfg.rope_theta)
    # ---- resume
    tick, phases = checkpoints.resume(config.checkpoint.resume, phases)
    if tick:
        distributed.show(f"resumed at step {tick} of {config.total}")
    stop.leave()
    with contextlib.ExitStack() as stack:
        # ---- what is seen of it
        sizes = cfg, experts, router_cfg, table.mask_LEU.shape[-1]
        seen = {name: flops.figures(*sizes, plan[name], batches[name], config.rounds) for name in plan}
        device, main = mesh.devices.flat[0], distributed.is_main()
        metrics = Metrics(
            work.path / "metrics.jsonl" if main else None,
            tick,
            work.path / "tensorboard" if config.tensorboard else None,
            {"project": config.wandb, "name": config.out.name, "dir": str(work.path)} if config.wandb else None,
        )
        peak, pace = peak_flops(device.device_kind), Pace(inline=device.platform == "cpu")
        watch = Watch(
            metrics, pace, seen, config.at, config.rounds,
            peak=peak and peak * mesh.size, window=config.checkpoint.window, silent=not main,
        )  # fmt: skip
        stack.callback(watch.close)

        # ---- batches, steps and their programs
        def batch_of(tick: int) -> dict[str, jax.Array]:
            name, number = config.at(tick)
            batch = place_batch(batches[name], number, caches.get({"router": "labels", "experts": "top_k"}[name]))
            if name == "experts" and "top_k" in caches:
                batch["teacher"] = TopK(*(batch.pop(field) for field in ("logp", "token", "rest")))
            return batch

        ahead = stack.enter_context(contextlib.closing(Ahead(batch_of, config.total, pace)))
        routed = RoutedBatches(ahead, route, experts.experts, config.experts.way, pace)
        prepared = {name: Prepared(name, step, pace) for name, step in made.items()}
        arguments = {
            "router": lambda batch: (phases["router"], batch),
            "experts": lambda batch: (phases["experts"], frozen, teacher or None, table, batch),
        }

        def labelled(batch: dict, run: Callable = lambda function, *inputs: function(*inputs)) -> dict:
            if "labels" in caches:
                return batch
            current = steps.join(phases["experts"].params, frozen)
            return batch | {"target": run(label_all, current, table, batch["ids"], batch["segments"])}

        def chooser():
            return phases["router"].params if route is not None else None

        def refit(tick: int) -> None:
            if config.refits(tick):
                p = config.experts
                text = Batches(pools["refit"], weights, batch=p.batch, accum=p.accum, seed=config.seed)
                phases["experts"] = refit_phase(cfg, phases["experts"], frozen, table, text, p.refit, route, chooser())

        with pace.waiting("compile"):
            to_label = functools.partial(labelled, run=output)
            compile_ahead(prepared, arguments, likely_batches(config, tick, batch_of, to_label, routed, chooser()))
        # ---- loop
        profiler = stack.enter_context(contextlib.closing(Profiler(config.profile, work.path / "profile")))
        timer, agreement = Timer(config.checkpoint.minutes), distributed.Agreement()
        stack.enter_context(jax.transfer_guard_host_to_device("disallow"))
        while tick < config.total:
            refit(tick)
            name, load = config.at(tick)[0], {}
            if name == "experts":
                batch, load["load"] = routed.take(tick, chooser(), last=config.ends_phase(tick))
            else:
                batch = ahead(tick)
                with pace.calling():
                    batch = labelled(batch)
            phases[name], values = prepared[name](*arguments[name](batch))
            values |= load
            profiler.step(values)
            watch.step(tick, values)  # logs the step before while this one runs: the loop never waits for the device
            ends, tick = config.ends_phase(tick), tick + 1
            saves = ends or (config.checkpoint.steps > 0 and tick % config.checkpoint.steps == 0)
            wish = agreement.step(STOP if stop.asked else SAVE if main and not saves and timer.due() else 0)
            if wish or saves:
                watch.flush()
                with pace.waiting("save"):
                    checkpoints.save(tick, phases, watch.score())
                work.kept = True
                timer.restart()
            if wish == STOP:
                checkpoints.wait()
                raise Stopped(f"stopped by {stop.asked or 'another process'}; saved at step {tick} of {config.total}")
        refit(tick)
    # ---- result
    work.scratch += [name for cache in caches.values() for name in cache.files]
    write(config, work, steps.join(phases["experts"].params, frozen), experts, table_LEC, router_cfg, phases)
    ran = {name: plan[name].steps * config.rounds * seen[name].tokens for name in plan}
    work.info |= {"tokens": ran, **watch.speeds(ran), **peak_memory()}


if __name__ == "__main__":
    cli.run(main)
