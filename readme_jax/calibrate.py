"""Activation statistics of the FFN's channels, by domain (METHOD section 2): one jitted pass over packed records."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax.config import ModelConfig, free, require
from readme_jax.models import backbone
from readme_jax.sharding import MeshConfig

SUMS = ("abs", "square", "mean", "share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """One calibration."""

    model: Path
    """Dense model folder (result of `import`)."""
    data: Path
    """Result of `data`; its calibration records are read."""
    out: Path
    """Folder to write statistics.safetensors to."""
    batch: int = 1
    """Records of one forward pass; a multiple of the mesh's batch devices."""
    window: int = 0
    """Also keep what fires in each run of so many tokens, for `carve --carving discovered`: 2 * L * F bytes a window.
    16 is a good length; 1 keeps every token. 0: none are kept."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the forward pass; statistics are summed in float32 and float64."""
    mesh: MeshConfig = free(MeshConfig())
    """Devices on each mesh axis; the batch is split over data and expert."""

    def __post_init__(self):
        require(self.batch >= 1, f"batch={self.batch} must be at least 1")
        require(self.window >= 0, f"window={self.window} must not be negative")


def make_statistics(cfg: ModelConfig, dtype=jnp.float32, window: int = 0):
    """jitted (params, ids_BT, segments_BT) -> float32 sums over the tokens that are not padding.

    h is the input of down_proj. {"abs": sum |h|, "square": sum h^2, "mean": sum h, "share": sum of each token's
    normalised energy h_j^2 ||w_j||^2 / sum_k h_k^2 ||w_k||^2} all [L, F], and "tokens" [] int32. Sharded batches are
    summed over the mesh. With a window of S tokens also "windows" float16 [L, B, P, F]: the mean share of each channel
    over the tokens of each of the P = ceil(T / S) windows of a row, times F.
    """

    @jax.jit
    def statistics(params, ids_BT: jax.Array, segments_BT: jax.Array) -> dict[str, jax.Array]:
        keep_BT = (segments_BT > 0).astype(jnp.float32)

        def tap(h_BTF, layer, table):
            h_BTF = h_BTF.astype(jnp.float32) * keep_BT[..., None]
            square_BTF = h_BTF * h_BTF
            energy_BTF = square_BTF * jnp.sum(jnp.square(layer.w_down[...].astype(jnp.float32)), -1)
            total_BT1 = jnp.maximum(jnp.sum(energy_BTF, -1, keepdims=True), 1e-30)
            share_BTF = energy_BTF / total_BT1
            over = (0, 1)
            kept = {} if not window else {"windows": window_means(share_BTF, keep_BT, window)}
            return kept | {
                "abs": jnp.sum(jnp.abs(h_BTF), over),
                "square": jnp.sum(square_BTF, over),
                "mean": jnp.sum(h_BTF, over),
                "share": jnp.sum(share_BTF, over),
            }

        _, sums = backbone.forward(cfg, params, ids_BT, segments_BT, tap=tap, dtype=dtype)
        return sums | {"tokens": jnp.sum(segments_BT > 0, dtype=jnp.int32)}

    return statistics


def window_means(share_BTF: jax.Array, keep_BT: jax.Array, window: int) -> jax.Array:
    """float16 [B, P, F]: the mean over the kept tokens of each window, times F; 0 for a window of padding alone."""
    b, t, f = share_BTF.shape
    more, count = -t % window, -(-t // window)
    sums_BPF = jnp.sum(jnp.pad(share_BTF, ((0, 0), (0, more), (0, 0))).reshape(b, count, window, f), 2)
    tokens_BP1 = jnp.sum(jnp.pad(keep_BT, ((0, 0), (0, more))).reshape(b, count, window, 1), 2)
    return (sums_BPF / jnp.maximum(tokens_BP1, 1) * f).astype(jnp.float16)


class Accumulator:
    """Sums of one domain over batches, float64 on the host, with what is needed to go on after a kill."""

    def __init__(self, layer: int, mlp: int):
        self.sums = {name: np.zeros((layer, mlp)) for name in SUMS}
        self.tokens = 0
        self.batches = 0
        self.seconds = 0.0

    def add(self, sums: dict[str, jax.Array], seconds: float) -> None:
        """Add the sums of one batch and the time it took."""
        for name in SUMS:
            self.sums[name] += np.asarray(sums[name], np.float64)
        self.tokens += int(sums["tokens"])
        self.batches += 1
        self.seconds += seconds

    def means(self) -> dict[str, np.ndarray]:
        """float32 means per token, [L, F] each."""
        return {name: (value / max(self.tokens, 1)).astype(np.float32) for name, value in self.sums.items()}

    def state(self) -> dict[str, np.ndarray]:
        """Arrays that `restore` reads back."""
        counts = np.array([self.tokens, self.batches], np.int64)
        return {**self.sums, "counts": counts, "seconds": np.array(self.seconds)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from a stored state."""
        self.sums = {name: np.array(state[name]) for name in SUMS}
        self.tokens, self.batches = (int(v) for v in state["counts"])
        self.seconds = float(state["seconds"])
