"""Recipes compared on the same model, text, tokens and seeds: held-out loss against tuned tokens, and what it cost.

readme-jax study configs/study/smollm2.yaml

In: the YAML of a study and its recipes. Out: study.json, study.md and pictures, anew after every recipe; every stage's
folder below `stages`. What recipes have in common is run once; interrupted, the same command goes on.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from readme_jax import artifacts, cli, hf, study, study_page, study_result
from readme_jax.carve import channels_of
from readme_jax.config import require
from readme_jax.metrics import Stopwatch, peak_memory, reset_peak_memory
from readme_jax.study import Stage, StudyConfig
from readme_jax.train import alternate, calibrate, carve, evaluate, import_hf, masks, prepare

PROGRAMS = {"calibrate": calibrate, "carve": carve, "alternate": alternate, "masks": masks, "evaluate": evaluate}


def main(argv: list[str] | None = None) -> None:
    """Run or resume a study."""
    config: StudyConfig = cli.parse(StudyConfig, argv, __doc__ or "", prog="readme-jax study", first="config")
    recipes = study.read_recipes(config)
    jobs = study.plan(config, recipes)
    study_page.check()
    out, run = config.out, Run(config.out)
    run.call("import", lambda: import_hf.main(["--source", config.model, "--out", str(out / "dense")]))
    cfg, experts, _ = hf.read_config(out / "dense")
    require(experts is None, f"model={config.model} is carved already: a study begins with a dense model")
    for job in jobs:
        channels_of(job.stages[1].config.fraction, cfg.mlp)  # what carving would refuse is refused now
    run.program("data", prepare, {"model": out / "dense", "data": config.seen, "out": out / "data"})
    if config.unseen:
        run.program("unseen", prepare, {"model": out / "dense", "data": config.held_out, "out": out / "unseen"})
    dense = study.evaluations(config, "dense")
    for stage in dense.values():
        run.stage(stage)

    def report() -> None:
        study_page.write(study_result.collect(config, recipes, jobs, dense), out)

    for number, job in enumerate(jobs, 1):
        print(f"\n==== {number} of {len(jobs)}: {job.recipe}, {job.tokens} tokens, seed {job.seed}", flush=True)
        before = job.finished
        for stage in [*job.stages, *job.evaluations.values()]:
            run.stage(stage)
        if not before:
            report()
    for stage in (job.bounds for job in jobs if job.bounds is not None and not job.bounds.finished):
        run.stage(stage)
        report()
    report()
    print(f"\nstudy: {out / 'study.md'}")


class Run:
    """Stages of one study: each is run once, timed over all starts, and its config kept as the YAML one would write."""

    def __init__(self, out: Path):
        self.out, self.watch, self.done = out, Stopwatch(), set()
        (out / "configs").mkdir(parents=True, exist_ok=True)

    def stage(self, stage: Stage) -> None:
        """Run a stage unless this start has already."""
        self.program(stage.key, PROGRAMS[stage.program], stage.options)

    def program(self, key: str, module: Any, options: dict[str, Any]) -> None:
        """Run a program on options; it resumes by itself, and leaves what is finished as it is."""
        if key in self.done:
            return
        path = self.out / "configs" / f"{key}.yaml"
        artifacts.write_text(path, yaml.safe_dump(study.plain(options), sort_keys=False))
        self.call(key, lambda: module.main(["--config", str(path)]), Path(options["out"]))
        self.done.add(key)

    def call(self, key: str, work: Callable[[], object], folder: Path | None = None) -> None:
        """Do some work, print its name, and add what it took to stages.json; a finished folder takes nothing."""
        if (self.out / "dense" if folder is None else folder).joinpath(artifacts.MANIFEST).is_file():
            work()
            return
        print(f"\n== {key} ({time.strftime('%H:%M:%S')}, {self.watch.seconds / 60:.1f} min so far)", flush=True)
        reset_peak_memory()
        watch = Stopwatch()
        try:
            work()
        finally:
            timings = study_result.read_timings(self.out)
            old = timings.get(key, {"seconds": 0.0, "peak_memory_gb": 0.0})
            peak = max(old["peak_memory_gb"], peak_memory()["peak_memory_gb"])
            timings[key] = {"seconds": old["seconds"] + watch.seconds, "peak_memory_gb": peak}
            artifacts.write_text(self.out / "stages.json", json.dumps(timings, indent=1))


if __name__ == "__main__":
    cli.run(main)
