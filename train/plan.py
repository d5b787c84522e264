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
from readme_jax.config import ExpertConfig, free, require, to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(AlternateConfig):
    """One plan: a run of `alternate`, and what it is planned for."""

    accelerator: str = free("")
    """Kind of device: v4, v5e, v5p, v6e, a100-40, a100-80, h100, h200, b200 or gh200."""
    devices: int = free(0)
    """Devices there will be, which the mesh must match; 0: as many as the mesh says."""
    seq: int = free(0)
    """Tokens of a record; 0: those of the data folder."""
    carve_experts: int = free(7)
    """Experts of a model that is not carved yet."""
    carve_fraction: float = free(0.5)
    """Share of the FFN channels of one expert, of a model that is not carved yet."""
    margin: float = free(0.1)
    """Share of a device's memory that must stay free: for the runtime, and for what the estimate is off."""
    mfu: float = free(0.4)
    """Share of the peak arithmetic that useful FLOPs are assumed to reach; hours follow from it."""
    json: Path | None = free(None)
    """File to write the plan to."""

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.accelerator), f"accelerator: name one of {', '.join(accelerators.ACCELERATORS)}")
        require(min(self.devices, self.seq) >= 0, f"devices={self.devices}, seq={self.seq} must not be negative")
        require(self.carve_experts >= 1, f"carve_experts={self.carve_experts} must be at least 1")
        require(0 <= self.margin < 1, f"margin={self.margin} must be at least 0 and below 1")
        require(0 < self.mfu <= 1, f"mfu={self.mfu} must be above 0 and at most 1")
