"""Held-out loss and perplexity by domain, and routing statistics, of any model folder.

readme-jax evaluate --model runs/tuned --data runs/data --out runs/evaluation --arms dense routed

In: a model folder and packed text (`data`). Out: evaluation.json and a table on the terminal. With --tasks the command
line starts `readme-jax tasks` instead: readme-jax evaluate runs/tuned --tasks hellaswag,piqa
"""

import functools
import json

import numpy as np

from readme_jax import artifacts, cli, hf, placement
from readme_jax.config import ConfigError, require
from readme_jax.data import eval_batches, open_records
from readme_jax.evaluate import ORACLES, EvaluateConfig, Routing, make_losses, one_route, own_expert, summarise
from readme_jax.metrics import Stopwatch, peak_memory, progress
from readme_jax.models import backbone, router
from readme_jax.models.experts import Masked, make_table
from readme_jax.sharding import batch_devices, put, spec, use_mesh
from readme_jax.steps import make_route


def main(argv: list[str] | None = None) -> None:
    """Evaluate once; a finished folder of the same config and inputs is only printed again."""
    config: EvaluateConfig = cli.parse(EvaluateConfig, argv, __doc__ or "", prog="readme-jax evaluate", first="model")
    others = {"router": config.router, "labeller": config.labeller}
    parents = {"model": config.model, "data": config.data} | {name: path for name, path in others.items() if path}
    if not artifacts.finished(config.out, "evaluate", config, parents):
        evaluate(config, parents)
    artifacts.verify(config.out, hashes=True)
    result = json.loads((config.out / "evaluation.json").read_text())
    for arm, domains in result["arms"].items():
        means = [f"{name} {entry['perplexity']:.2f}" for name, entry in domains.items()]
        print(f"{arm:<10} mean loss {result['mean_loss'][arm]:.4f}   perplexity: {', '.join(means)}")


def evaluate(config: EvaluateConfig, parents: dict) -> None:
    """Run every arm over the test records and write the result."""
    cfg, experts, router_cfg = hf.read_config(config.model)
    tied = experts is not None and experts.storage == "tied"
    if experts is None:
        require(config.arms == ("dense",), f"arms={config.arms}: a dense model has only the arm dense")
    else:
        require(tied or "dense" not in config.arms, "arm dense: separate storage has no dense form")
    many = experts is not None and experts.experts > 1
    require(many or not config.agreement, f"agreement=true: {config.model} has one choice for every token")
    for arm in (arm for arm in ORACLES if arm in config.arms):
        require(many, f"arm {arm}: {config.model} has one choice for every token")
        require(tied, f"arm {arm}: separate storage has no dense form to label tokens in")
    if config.router is not None:
        _, other, router_cfg = hf.read_config(config.router)
        same = other is not None and experts is not None and other.names == experts.names
        require(same, f"router={config.router}: its experts differ from those of {config.model}")
    if config.labeller is not None:
        shapes, other, _ = hf.read_config(config.labeller)
        alike = shapes == cfg and other == experts
        require(alike, f"labeller={config.labeller}: its shapes or experts differ from those of {config.model}")
    if "routed" in config.arms and many and router_cfg is None:
        raise ConfigError(f"arm routed: {config.model} has {experts.experts} experts and no router")  # type: ignore
    records = open_records(config.data, "test", cfg.vocab)
    own = {name: own_expert(experts.names, name) for name in records} if "own_domain" in config.arms else {}  # type: ignore
    with use_mesh(config.mesh), artifacts.building(config.out, "evaluate", config, parents) as work:
        require(config.batch % batch_devices() == 0, f"batch={config.batch} must be a multiple of {batch_devices()}")
        specs = backbone.param_specs(cfg)
        params, table_LEC, router_params = placement.load_sharded(config.model, specs, dtype=np.float32)
        if config.router is not None:
            other_LEC, router_params = placement.load_router(config.router, dtype=np.float32)
            alike = other_LEC is not None and table_LEC is not None and np.array_equal(other_LEC, table_LEC)
            require(alike, f"router={config.router}: its expert table differs from that of {config.model}")
        table = None if table_LEC is None else make_table(table_LEC, cfg.mlp)
        labeller = params
        if config.labeller is not None:
            labeller, other_LEC, _ = placement.load_sharded(config.labeller, specs, dtype=np.float32)
            alike = other_LEC is not None and table_LEC is not None and np.array_equal(other_LEC, table_LEC)
            require(alike, f"labeller={config.labeller}: its expert table differs from that of {config.model}")
        route = None
        if many and router_params is not None and router_cfg is not None:
            route = functools.partial(make_route(router_cfg, cfg.rope_theta), router.place(router_params))
        losses = make_losses(cfg, config.labels if config.labelled else None)
        rows = {arm: {name: ([], []) for name in records} for arm in config.arms}
        routing, oracle = (Routing(len(records), experts.experts if experts else 1) for _ in range(2))
        place = functools.partial(put, partition=spec("batch", "seq"))
        start = Stopwatch()
        tokens = sum(int(np.count_nonzero(r.segments)) for r in records.values()) * len(config.arms)
        names = list(records)
        with progress(tokens, "evaluate") as bar:
            for batch in eval_batches(records, config.batch):
                name = names[batch["domains"][0]]
                ids, segments = (put(batch[key], spec("batch", "seq")) for key in ("ids", "segments"))
                real = batch["index"] >= 0
                chosen = None if route is None else route(ids[None], segments[None])[0]
                said = losses(labeller, table, ids, segments, None) if config.labelled else None
                best, done = said[2] if said else {}, {}
                if "dense" in config.arms:
                    done["dense"] = said if said and labeller is params else losses(params, table, ids, segments, None)
                for arm in config.arms:
                    if arm == "own_domain":
                        path = one_route(own[name], batch["ids"], place)
                    elif arm in ORACLES:
                        path = Masked(best[arm])
                    else:
                        path = one_route(0, batch["ids"], place) if chosen is None else Masked(chosen)
                    if arm not in done:
                        done[arm] = losses(params, table, ids, segments, path)
                    loss_B, weight_B, _ = done[arm]
                    rows[arm][name][0].extend(np.asarray(loss_B, np.float64)[real].tolist())
                    rows[arm][name][1].extend(np.asarray(weight_B, np.float64)[real].tolist())
                    bar.update(int(np.count_nonzero(batch["segments"])))
                for count, choice in ((routing, chosen), (oracle, best.get("oracle"))):
                    if choice is not None:
                        label = np.asarray(best["oracle"]) if best else None
                        count.add(int(batch["domains"][0]), np.asarray(choice), batch["segments"], label)
        arms = {arm: {n: summarise(*pair) for n, pair in by.items()} for arm, by in rows.items()}
        result = {
            "arms": arms,
            "mean_loss": {arm: float(np.mean([e["loss"] for e in by.values()])) for arm, by in arms.items()},
            "routing": routing.summary() if route is not None else None,
            "oracle": oracle.summary() if config.labelled else None,
            "records": {arm: {n: {"loss": p[0], "tokens": p[1]} for n, p in by.items()} for arm, by in rows.items()},
        }
        artifacts.write_text(work.path / "evaluation.json", json.dumps(result))
        work.info |= {
            "seconds": start.seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / start.seconds,
            **peak_memory(),
        }


if __name__ == "__main__":
    cli.run(main)
