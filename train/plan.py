"""What a training run will need before a device is spent on it: parameters, memory, tokens, FLOPs, hours.

readme-jax plan configs/llama2-7b-paper/alternate.yaml --accelerator v5p --model MODEL --seq 4096

In: the YAML of `alternate` (every option of it can be given here too) and a model folder or a bare config.json: no
weights, no data, no devices. Out: a table, `--json FILE` too. A run that cannot fit ends with exit code 2 and the
biggest lever. Memory is estimated from the traced program, not measured.
"""

import dataclasses
import json
from pathlib import Path

import jax

from readme_jax import accelerators, artifacts, cli, hf, planning
from readme_jax.abstract import Run
from readme_jax.alternate import AlternateConfig
from readme_jax.carve import EXPERTS, channels_of
from readme_jax.config import ExpertConfig, free, require

GB = 1e9
USUAL, ROUGH = 0.1, 0.25  # shares of memory kept free; ROUGH: where the plan was compared once and was a third below


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(AlternateConfig):
    """One plan: a run of `alternate`, and what it is planned for."""

    accelerator: str = free("")
    """Kind of device: v4, v4i, v5e, v5p, v6e, a100-40, a100-80, h100, h100-pcie, h200, b200 or gh200."""
    devices: int = free(0)
    """Devices there will be: the mesh must match them, and no lever asks for more; 0: as many as the mesh says."""
    seq: int = free(0)
    """Tokens of a record; 0: those of the data folder."""
    carve_experts: int = free(7)
    """Experts of a model that is not carved yet."""
    carve_fraction: float = free(0.5)
    """Share of the FFN channels of one expert, of a model that is not carved yet."""
    margin: float = free(-1.0)
    """Share of a device's memory that must stay free: for the runtime, and for what the estimate is off. -1: 0.1, and
    0.25 for separate experts on a TPU, where XLA's heap was a third above the estimate in the run compared."""
    disk: float = free(0.0)
    """GB/s that all hosts together write to the file system of `out`; 0: not known, said is what checkpoints need."""
    mfu: float = free(0.4)
    """Share of the peak arithmetic that useful FLOPs are assumed to reach; hours follow from it."""
    json: Path | None = free(None)
    """File to write the plan to."""

    def __post_init__(self):
        super().__post_init__()
        require(min(self.devices, self.seq) >= 0, f"devices={self.devices}, seq={self.seq} must not be negative")
        require(self.carve_experts >= 1, f"carve_experts={self.carve_experts} must be at least 1")
        free_share = self.margin == -1 or 0 <= self.margin < 1
        require(free_share, f"margin={self.margin} must be at least 0 and below 1, or -1")
        require(self.disk >= 0, f"disk={self.disk} must not be negative")
        require(0 < self.mfu <= 1, f"mfu={self.mfu} must be above 0 and at most 1")


def main(argv: list[str] | None = None) -> None:
    """Plan once: print the table, then fail if the run cannot fit."""
    config: PlanConfig = cli.parse(PlanConfig, argv, __doc__ or "", prog="readme-jax plan", first="config")
    device = accelerators.find(config.accelerator)
    mesh = planning.abstract_mesh(config.mesh, config.devices)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=mesh.shape["data"]))
    run, records = read_run(config)
    if config.margin == -1:
        rough = config.experts.way == "parallel" and device.platform == "tpu"
        config = dataclasses.replace(config, margin=ROUGH if rough else USUAL)
    room = (1 - config.margin) * device.memory
    with jax.sharding.use_abstract_mesh(mesh):
        needs = planning.memory(run, device.platform)
        saved = planning.checkpoint_bytes(run)
    work, counts = planning.work(run, records), planning.parameters(run)
    hours = work.hours(device, mesh.size, config.mfu)
    name, most = planning.peak(needs)
    fits, more = most.total <= room, not config.devices
    path = [] if fits else planning.way_to_fit(run, device.platform, most.total, room, more)
    plan = {
        "accelerator": config.accelerator,
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "parameters": counts,
        "memory": {step: dataclasses.asdict(each) | {"total": each.total} for step, each in needs.items()},
        "peak": {"step": name, "bytes": most.total, "of": device.memory, "usable": room, "fits": fits},
        "tokens": work.tokens,
        "flops": work.flops,
        "mfu": config.mfu,
        "hours": hours,
        "checkpoint": checkpoint(config, saved, hours),
        "levers": [{"setting": lever.setting, "bytes": lever.total} for lever in path],
    }
    print(table(plan, config))
    if config.json:
        config.json.write_text(json.dumps(plan, indent=2) + "\n")
    require(fits, refusal(plan), planning.PlanError)


def checkpoint(config: PlanConfig, saved: int, hours: dict[str, float]) -> dict:
    """What saving the run asks of the disk: bytes, seconds, bytes a second."""
    held = config.checkpoint.keep + config.checkpoint.keep_best + 1  # an old one goes when the new one is whole
    every = planning.checkpoint_seconds(config, hours)
    takes = saved / (config.disk * GB) if config.disk else None
    return {"bytes": saved, "held": held, "every": every, "rate": saved / every, "takes": takes}


def read_run(config: PlanConfig) -> tuple[Run, int]:
    """Sizes of the model and of the records, and how many train records there are (0: no data folder yet)."""
    bare = config.model.name == "config.json" and config.model.is_file()
    folder = config.model.parent if bare else config.model
    cfg, experts, router = hf.read_config(folder)
    used = 0
    if experts is None:
        count, channels = config.carve_experts, channels_of(config.carve_fraction, cfg.mlp)
        separate = config.experts.way == "parallel"
        experts = ExpertConfig(
            experts=count,
            channels=channels,
            storage="separate" if separate else "tied",
            names=tuple(f"expert{i}" for i in range(count)),
            importance="mean_abs",
            carving="domain" if count > 1 else "static",
        )
        cfg = dataclasses.replace(cfg, mlp=count * channels) if separate else cfg
    elif any(folder.glob("*.safetensors")):
        used = int(hf.Reader(folder).get(EXPERTS).max()) + 1  # carving puts the channels of no expert last
    seq, records = config.seq, 0
    if (config.data / artifacts.MANIFEST).is_file():
        manifest = artifacts.read_manifest(config.data)
        made = manifest["config"]["seq"]
        require(seq in (0, made), f"seq={seq}, but the records of data={config.data} have {made} tokens")
        seq, records = made, sum(d["train"]["records"] for d in manifest["info"]["domains"].values() if "train" in d)
    require(seq > 0, f"seq: say it, there is no result in data={config.data} yet")
    require(seq <= cfg.max_position, f"seq={seq} exceeds the model's context of {cfg.max_position}")
    chooser = None if experts.experts == 1 else router or config.router.shape
    return Run(config, cfg, experts, chooser, seq, used=used), records


def table(plan: dict, config: PlanConfig) -> str:
    """The plan for a person."""
    counts, peak, device = plan["parameters"], plan["peak"], accelerators.find(plan["accelerator"])
    axes = ", ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    lines = [
        f"devices      {plan['devices']} x {device.name}, each {device.memory / GB:.1f} GB and "
        f"{device.flops / 1e12:.0f} TFLOP/s in bf16; mesh {axes}",
        f"parameters   {counts['backbone'] / 1e9:.3f} B, {counts['active'] / 1e9:.3f} B of them active for a token; "
        f"router {counts['router'] / 1e6:.1f} M",
        f"compute      {config.dtype}, experts.way={config.experts.way}, remat={config.experts.remat}",
        "",
        f"GB a device  {'weights':>9} {'optimizer':>9} {'activations':>11} {'buffers':>9} {'in all':>9}",
    ]
    for step, each in plan["memory"].items():
        cells = [each[key] / GB for key in ("weights", "optimizer", "activations", "buffers", "total")]
        lines.append(f"  {step:<10} {cells[0]:9.3f} {cells[1]:9.3f} {cells[2]:11.3f} {cells[3]:9.3f} {cells[4]:9.3f}")
    said = "fits" if peak["fits"] else "does NOT fit"
    lines += [
        f"  {said}: the {peak['step']} step needs {peak['bytes'] / GB:.3f} of {peak['usable'] / GB:.1f} GB "
        f"({config.margin:.0%} kept free)",
    ]
    if config.experts.way == "parallel" and device.platform == "tpu":
        lines.append("  rough: of separate experts on TPU, the one run that was compared took 33% more than planned")
    lines += [
        "",
        f"{'phase':<12} {'tokens':>14} {'FLOPs':>9} {'hours':>9}  at an assumed MFU of {plan['mfu']:.0%}",
    ]
    for phase, tokens in plan["tokens"].items():
        if tokens:
            lines.append(f"  {phase:<10} {tokens:14,} {plan['flops'][phase]:9.2e} {plan['hours'][phase]:9.2f}")
    total = sum(plan["hours"].values())
    lines.append(
        f"  {'in all':<10} {sum(plan['tokens'].values()):14,} {sum(plan['flops'].values()):9.2e} {total:9.2f}  "
        f"= {total * plan['devices']:.1f} device hours"
    )
    saving = plan["checkpoint"]
    lines += [
        "",
        f"checkpoint   {saving['bytes'] / GB:.1f} GB each, {saving['held']} on the disk at once while one is written: "
        f"{saving['held'] * saving['bytes'] / GB:.1f} GB",
        f"  one every {saving['every'] / 60:.1f} min needs a disk that takes {saving['rate'] / GB:.3f} GB/s",
    ]
    if saving["takes"] is not None:
        late = saving["takes"] > saving["every"]
        lines.append(
            f"  at {config.disk:g} GB/s it takes {saving['takes'] / 60:.1f} min"
            + (": training waits for it; raise checkpoint.minutes" if late else "")
        )
    return "\n".join(lines)


def refusal(plan: dict) -> str:
    """One line: what is missing, and the levers that change it, the biggest first."""
    peak, levers = plan["peak"], plan["levers"]
    said = (
        f"the run does not fit: its {peak['step']} step needs {peak['bytes'] / GB:.3f} GB a device, "
        f"{plan['accelerator']} has {peak['usable'] / GB:.3f} GB to use"
    )
    if not levers:
        return f"{said}; no setting that was tried makes it smaller"
    steps = [f"{lever['setting']} ({lever['bytes'] / GB:.3f} GB)" for lever in levers]
    enough = levers[-1]["bytes"] <= peak["usable"]
    return f"{said}; biggest lever: {', then '.join(steps)}{'' if enough else ', which is still too much'}"


if __name__ == "__main__":
    cli.run(main)
