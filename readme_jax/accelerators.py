"""The accelerators that a run is planned for or runs on: peak arithmetic, memory and its speed, of one JAX device.

Figures are the vendors' own, dense (no sparsity), of the part that is commonly rented. Bytes, and rates per second.
"""

import dataclasses

from readme_jax.config import ConfigError

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device. flops: bf16 matrix peak, FLOP/s. memory: bytes. bandwidth: of that memory, bytes/s.

    kinds: how its `jax.Device.device_kind` begins; a longer beginning of another device goes before.
    topologies: for TPUs, chips to the slice's shape, as `jax.experimental.topologies` names it behind the generation.
    """

    name: str
    platform: str
    flops: float
    memory: float
    bandwidth: float
    kinds: tuple[str, ...]
    topologies: tuple[tuple[int, str], ...] = ()


# Slices as Google's pages list them: v5e and v6e are flat, v4 and v5p are solid.
FLAT = ((1, "1x1"), (4, "2x2"), (8, "2x4"), (16, "4x4"), (32, "4x8"), (64, "8x8"), (128, "8x16"), (256, "16x16"))
SOLID = (
    (4, "2x2x1"), (8, "2x2x2"), (16, "2x2x4"), (32, "2x4x4"), (64, "4x4x4"), (128, "4x4x8"), (256, "4x8x8"),
    (512, "8x8x8"), (1024, "8x8x16"),
)  # fmt: skip

ACCELERATORS = {
    a.name: a
    for a in (
        # cloud.google.com/tpu/docs/v4: 275 TFLOPs bf16, 32 GiB, 1200 GBps a chip
        Accelerator("v4", "tpu", 275e12, 32 * GIB, 1200e9, ("TPU v4",), SOLID),
        # Jouppi et al., "Ten Lessons From Three Generations Shaped Google's TPUv4i", ISCA 2021, table 1: 138 TFLOPS
        # bf16, 8 GiB, 614 GB/s
        Accelerator("v4i", "tpu", 138e12, 8 * GIB, 614e9, ("TPU v4 lite",)),
        # cloud.google.com/tpu/docs/v5e: 197 TFLOPs bf16, 16 GB, 819 GBps a chip
        Accelerator("v5e", "tpu", 197e12, 16 * GB, 819e9, ("TPU v5 lite", "TPU v5e"), FLAT),
        # cloud.google.com/tpu/docs/v5p: 459 TFLOPs bf16, 95 GiB, 2765 GBps a chip
        Accelerator("v5p", "tpu", 459e12, 95 * GIB, 2765e9, ("TPU v5", "TPU v5p"), SOLID),
        # cloud.google.com/tpu/docs/v6e: 918 TFLOPs bf16, 32 GB, 1638 GBps a chip
        Accelerator("v6e", "tpu", 918e12, 32 * GB, 1638e9, ("TPU v6 lite", "TPU v6e"), FLAT),
        # NVIDIA A100 Tensor Core GPU datasheet: 312 TFLOPS bf16; 40 GB at 1555 GB/s; 80 GB (SXM) at 2039 GB/s
        Accelerator("a100-40", "gpu", 312e12, 40 * GB, 1555e9, ("NVIDIA A100",)),
        Accelerator("a100-80", "gpu", 312e12, 80 * GB, 2039e9, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB")),
        # NVIDIA H100 datasheet, SXM5: 1979 TFLOPS bf16 with sparsity, half of it dense; 80 GB, 3.35 TB/s
        Accelerator("h100", "gpu", 989e12, 80 * GB, 3350e9, ("NVIDIA H100",)),
        # the same, PCIe: 1513 TFLOPS with sparsity, half of it dense; 80 GB, 2 TB/s
        Accelerator("h100-pcie", "gpu", 756e12, 80 * GB, 2000e9, ("NVIDIA H100 PCIe",)),
        # NVIDIA H200 datasheet, SXM: the same arithmetic, 141 GB at 4.8 TB/s
        Accelerator("h200", "gpu", 989e12, 141 * GB, 4800e9, ("NVIDIA H200",)),
        # NVIDIA DGX/HGX B200 datasheet: 8 GPUs give 36 PFLOPS bf16 with sparsity, half of it dense; 180 GB, 8 TB/s each
        Accelerator("b200", "gpu", 2250e12, 180 * GB, 8000e9, ("NVIDIA B200",)),
        # NVIDIA GH200 Grace Hopper datasheet, HBM3 part: 990 TFLOPS bf16 dense, 96 GB at 4 TB/s
        Accelerator("gh200", "gpu", 990e12, 96 * GB, 4000e9, ("NVIDIA GH200",)),
    )
}


def find(name: str) -> Accelerator:
    """The accelerator of a name; ConfigError with the known ones."""
    if name not in ACCELERATORS:
        raise ConfigError(f"accelerator={name!r} is not known (known: {', '.join(ACCELERATORS)})")
    return ACCELERATORS[name]


def peak_flops(kind: str) -> float | None:
    """Dense bf16 peak of a device kind (`jax.Device.device_kind`), FLOP/s; None for one that is not listed."""
    known = [(len(start), a.flops) for a in ACCELERATORS.values() for start in a.kinds if kind.startswith(start)]
    return max(known)[1] if known else None
