"""Machines that exist only as numbers, and what a step of a Read-ME model costs on one: the simulator's compute model.

A piece of work takes the longer of its arithmetic and its memory traffic (roofline), and a fixed overhead. Shares of
the peaks that are reached are assumptions, `Assumed`, and printed with every result.
"""

import dataclasses
from typing import Literal

import numpy as np

from readme_jax import accelerators, flops
from readme_jax.accelerators import Accelerator
from readme_jax.config import ConfigError, ModelConfig, RouterConfig, require

Read = Literal["touched", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumed:
    """What datasheets do not say: the shares of peaks that are reached, and what nothing hides."""

    flops_share: float = 0.5
    """Share of peak arithmetic."""
    memory_share: float = 0.8
    """Share of peak memory bandwidth."""
    link_share: float = 0.8
    """Share of the link's peak, of large copies from pinned memory: 24 to 26 of 31.5 GB/s is usual on PCIe 4."""
    latency: float = 5e-6
    """Seconds that the link rests before a transfer, also one that stands in a queue."""
    layer_overhead: float = 10e-6
    """Seconds a layer takes beside its work."""
    step_overhead: float = 300e-6
    """Seconds a step takes beside its layers and the head: what of scheduling and launching nothing hides."""

    def __post_init__(self):
        for name in ("link_share", "flops_share", "memory_share"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{name}={value} must be above 0 and at most 1")
        for name in ("latency", "layer_overhead", "step_overhead"):
            value = getattr(self, name)
            require(value >= 0, f"{name}={value} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """One accelerator with its host link, in bytes/s from host to device."""

    name: str
    device: Accelerator
    link: float
    assumed: Assumed = Assumed()

    @property
    def flops(self) -> float:
        """FLOP/s reached."""
        return self.device.flops * self.assumed.flops_share

    @property
    def bandwidth(self) -> float:
        """Bytes/s of device memory reached."""
        return self.device.bandwidth * self.assumed.memory_share

    @property
    def link_rate(self) -> float:
        """Bytes/s over the link reached."""
        return self.link * self.assumed.link_share

    def seconds(self, work: float, traffic: float) -> float:
        """Time of `work` FLOPs that read `traffic` bytes of device memory."""
        return max(work / self.flops, traffic / self.bandwidth)


# Host links, bytes/s in one direction.
# PCIe x16, 128b/130b: generation 4 16 GT/s a lane, 31.5 GB/s (A100 datasheet: 64 GB/s both ways); generation 5 twice
# that (H100 and H200 datasheets: 128 GB/s both ways). NVLink-C2C: 900 GB/s both ways (GH200 datasheet).
PCIE4, PCIE5, C2C = 31.5e9, 63e9, 450e9
# "How to Scale Your Model" (jax-ml.github.io/scaling-book, part "TPUs"): PCIe from the host gives a TPU about 16 GB/s,
# v6e twice as much. Google publishes no figure.
TPU, TPU_V6E = 16e9, 32e9
LINKS = {
    "a100-40": PCIE4, "a100-80": PCIE4, "h100": PCIE5, "h100-pcie": PCIE5, "h200": PCIE5, "gh200": C2C,
    "v5e": TPU, "v5p": TPU, "v6e": TPU_V6E,
}  # fmt: skip
MACHINES = {name: Machine(name=name, device=accelerators.find(name), link=link) for name, link in LINKS.items()}


def find(name: str, assumed: Assumed | None = None) -> Machine:
    """The machine of a name; ConfigError with the known ones."""
    if name not in MACHINES:
        raise ConfigError(f"machine={name!r} is not known (known: {', '.join(MACHINES)})")
    return dataclasses.replace(MACHINES[name], assumed=assumed or Assumed())


# ---- models by name -------------------------------------------------------------------------------


def _llama(embed: int, mlp: int, layer: int, head: int, kv_head: int, **more) -> ModelConfig:
    sizes = {"vocab": 32000, "head_dim": 128, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_position": 4096}
    sizes |= {"embed": embed, "mlp": mlp, "layer": layer, "head": head, "kv_head": kv_head, "tied": False}
    return ModelConfig(family="llama", **(sizes | more))


MODELS = {
    # Touvron et al., "Llama 2", arXiv 2307.09288, and the models' config.json
    "llama2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8),
    "smollm2-135m": _llama(
        576, 1536, 30, 9, 3, vocab=49152, head_dim=64, rope_theta=100000.0, max_position=8192, tied=True
    ),
}


# ---- what a step costs ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What a batch asks of every layer: tokens decoded and prefilled, rows sampled, tokens of context.

    context: tokens whose keys and values are read, added up over its requests. square: the same added up over its
    tokens, which is what scores are computed with.
    """

    decode: int
    prefill: int
    sampled: int
    context: int
    square: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a step, of a model on a machine; weights and caches of `itemsize` bytes a number.

    cfg.mlp is the dense width; channels: C of one expert; page: channels of an expert page. read: what decoding reads
    of a layer's FFN: the pages that the batch's experts touch, or `all` pages (no page list in the kernel).
    """

    machine: Machine
    cfg: ModelConfig
    channels: int
    router: RouterConfig
    experts: int
    page: int
    itemsize: int = 2
    read: Read = "touched"

    @property
    def row_bytes(self) -> int:
        """Bytes of one FFN channel: a row of gate, up and down."""
        return 3 * self.cfg.embed * self.itemsize

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token, all layers."""
        return 2 * self.cfg.kv_head * self.cfg.head_dim * self.itemsize * self.cfg.layer

    @property
    def router_kv_bytes(self) -> int:
        """The same of the router."""
        return 2 * self.router.width * self.router.layers * self.itemsize

    @property
    def _projection_bytes(self) -> int:
        cfg = self.cfg
        return 2 * cfg.embed * (cfg.head + cfg.kv_head) * cfg.head_dim * self.itemsize

    @property
    def _router_bytes(self) -> int:
        """Router weights that a token reads: its blocks; of the table one row."""
        return (6 * self.router.width**2 * self.router.layers + self.router.width * self.experts) * self.itemsize

    @property
    def fixed_bytes(self) -> int:
        """What lies on the device whatever the budgets: attention, embeddings, head, router with its table."""
        cfg = self.cfg
        tables = (1 if cfg.tied else 2) * cfg.vocab * cfg.embed + cfg.vocab * self.router.width
        return cfg.layer * self._projection_bytes + tables * self.itemsize + self._router_bytes

    def attention(self, rows: Rows) -> float:
        """Attention of one layer: projections and scores."""
        cfg, machine = self.cfg, self.machine
        each = flops.layers(cfg, 1, 0)
        tokens = rows.decode + rows.prefill
        work = (each.projections * tokens + each.scores * rows.square) / cfg.layer
        return machine.seconds(work, self._projection_bytes + rows.context * self.kv_bytes / cfg.layer)

    def ffn(self, rows: Rows, pages_L: np.ndarray, all_pages: int) -> np.ndarray:
        """float64 [L]: FFN of each layer, of which the batch touches pages_L pages of `all_pages` there are.

        Decoded tokens run masked, over every page read; prefilled ones grouped, each over its expert's channels.
        """
        machine = self.machine
        read_L = (np.full(len(pages_L), all_pages) if self.read == "all" else pages_L) * float(self.page)
        work_L = 6.0 * self.cfg.embed * (rows.decode * read_L + rows.prefill * self.channels)
        traffic_L = read_L * self.row_bytes
        return np.maximum(work_L / machine.flops, traffic_L / machine.bandwidth)

    def head(self, rows: Rows) -> float:
        """Logits of the sampled rows, and what a step costs beside its work."""
        cfg = self.cfg
        seconds = self.machine.seconds(
            rows.sampled * flops.head_flops(cfg), cfg.embed * cfg.vocab * self.itemsize if rows.sampled else 0.0
        )
        return seconds + self.machine.assumed.step_overhead

    def route(self, tokens: int, context: int) -> float:
        """The router over `tokens` tokens that see `context` tokens each, with a launch."""
        if not tokens:
            return 0.0
        work = tokens * flops.router_flops(self.router, self.experts, context)
        traffic = self._router_bytes + tokens * context * self.router_kv_bytes
        return self.machine.seconds(work, traffic) + self.machine.assumed.layer_overhead
