"""Held-out loss by domain for a dense or carved model, and what its routing does."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from readme_jax import losses
from readme_jax.config import ModelConfig, free, require
from readme_jax.labels import LabelConfig, combine_layers, label_tap
from readme_jax.models import backbone
from readme_jax.models.experts import Masked
from readme_jax.sharding import MeshConfig

Arm = Literal["dense", "own_domain", "routed", "oracle", "oracle_layers"]
ORACLES = ("oracle", "oracle_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation."""

    model: Path
    """Model folder to evaluate."""
    data: Path
    """Result of `data`; its test records are read."""
    out: Path
    """Folder to write evaluation.json to."""
    arms: tuple[Arm, ...] = ("dense", "routed")
    """`dense`: all channels. `own_domain`: every token takes the expert named like its domain. `routed`: the router's
    choice (expert 0 of a model with one expert). What kept energy would choose, labelled in a run with all channels:
    `oracle` gives a token the expert that keeps most in the mean over layers, `oracle_layers` that which keeps most in
    each layer. No bound: masks may serve the loss."""
    router: Path | None = None
    """Take the router of this folder instead of the model's own; its experts must be the same."""
    agreement: bool = False
    """With the arms `dense` and `routed`: also label every token in the dense run, and report how often the router
    agrees."""
    labeller: Path | None = None
    """Label tokens in a run of this folder with all channels, not of the model itself: for tuned weights, which may no
    longer be a model so, the carved model they began as. Its experts must be the same. Twice the memory of weights."""
    labels: LabelConfig = LabelConfig()
    """What the label of a token is, for `agreement` and the oracles."""
    batch: int = 1
    """Records of one forward pass; a multiple of the mesh's batch devices."""
    mesh: MeshConfig = free(MeshConfig())
    """Devices on each mesh axis."""

    def __post_init__(self):
        require(len(self.arms) > 0, "arms: at least one is needed")
        require(len(set(self.arms)) == len(self.arms), f"arms={self.arms} names an arm twice")
        both = {"dense", "routed"} <= set(self.arms)
        require(
            both or not self.agreement, "agreement=true needs the arms dense and routed: their choices are compared"
        )
        unasked = "labels: have no meaning without agreement=true or an oracle's arm"
        require(self.labelled or self.labels == LabelConfig(), unasked)
        named = self.labeller is None or self.labelled
        require(named, "labeller: has no meaning without agreement=true or an oracle's arm")
        require(self.router is None or "routed" in self.arms, "router: has no meaning without the arm routed")
        require(self.batch >= 1, f"batch={self.batch} must be at least 1")

    @property
    def labelled(self) -> bool:
        """True when every token is labelled in a dense run."""
        return self.agreement or any(arm in self.arms for arm in ORACLES)


def make_losses(cfg: ModelConfig, labels: LabelConfig | None = None, *, chunk: int = 128, dtype=jnp.float32):
    """jitted (params, table | None, ids_BT, segments_BT, route | None) -> (loss sums [B], weights [B], labels).

    Next-token loss in nats summed over each row's tokens, with the number of tokens. labels: of a dense run, by the
    name of the oracle, the expert with the best score, int32 [B, T], and that with the best one in each layer, int32
    [L, B, T]; empty unless `labels` is given and there is no route.
    """

    @jax.jit
    def evaluate(params, table, ids_BT, segments_BT, route):
        target_BT, weight_BT = losses.next_token(ids_BT, segments_BT)
        tap = label_tap(labels) if labels is not None and route is None else None
        x_BTD, seen = backbone.forward(cfg, params, ids_BT, segments_BT, table=table, route=route, tap=tap, dtype=dtype)
        best: dict[Arm, jax.Array] = {}
        if tap is not None and labels is not None:
            scores: dict[Arm, jax.Array] = {"oracle": combine_layers(seen, labels), "oracle_layers": seen}
            best = {name: jnp.argmax(score, -1).astype(jnp.int32) for name, score in scores.items()}
        loss_B, weight_B = losses.token_loss(backbone.head_weight(params), x_BTD, target_BT, weight_BT, chunk)
        return loss_B, weight_B, best

    return evaluate


class Routing:
    """Counts of a router's choices over records, by domain."""

    def __init__(self, domains: int, experts: int):
        self.count_ME = np.zeros((domains, experts), np.int64)
        self.kept = self.pairs = self.agreed = self.labelled = 0

    def add(self, domain: int, expert_BT: np.ndarray, segments_BT: np.ndarray, label_BT: np.ndarray | None) -> None:
        """Count one batch of one domain; padding (segment 0) is left out, pairs never cross a document border."""
        real_BT = segments_BT > 0
        self.count_ME[domain] += np.bincount(expert_BT[real_BT], minlength=self.count_ME.shape[1])
        together = (segments_BT[:, 1:] == segments_BT[:, :-1]) & real_BT[:, 1:]
        self.kept += int(((expert_BT[:, 1:] == expert_BT[:, :-1]) & together).sum())
        self.pairs += int(together.sum())
        if label_BT is not None:
            self.agreed += int(((expert_BT == label_BT) & real_BT).sum())
            self.labelled += int(real_BT.sum())

    def summary(self) -> dict[str, Any]:
        """load [E], load_by_domain [M][E] (shares), load_max_over_mean, entropy (nats of the mean load), keeps_previous
        (share of tokens with the previous token's expert; the paper counts 71.3 %), agreement with the labels."""
        load_ME = self.count_ME / np.maximum(self.count_ME.sum(1, keepdims=True), 1)
        load_E = self.count_ME.sum(0) / max(self.count_ME.sum(), 1)
        used_E = load_E[load_E > 0]
        return {
            "load": load_E.tolist(),
            "load_by_domain": load_ME.tolist(),
            "load_max_over_mean": float(load_E.max() * len(load_E)),
            "entropy": float(-(used_E * np.log(used_E)).sum()),
            "keeps_previous": self.kept / self.pairs if self.pairs else None,
            "agreement": self.agreed / self.labelled if self.labelled else None,
            "tokens": int(self.count_ME.sum()),
        }


def summarise(sums: Iterable[float], weights: Iterable[float]) -> dict[str, Any]:
    """Token-weighted loss of records, perplexity, tokens, and the standard error of the loss over records.

    Ratio estimator: se = sqrt(n / (n - 1) * sum (s_i - loss * w_i)^2) / sum w_i. None with one record.
    """
    sums_N, weights_N = np.asarray(list(sums), np.float64), np.asarray(list(weights), np.float64)
    total = max(weights_N.sum(), 1.0)
    loss = sums_N.sum() / total
    n = len(sums_N)
    error = np.sqrt(n / (n - 1) * np.square(sums_N - loss * weights_N).sum()) / total if n > 1 else None
    return {
        "loss": float(loss),
        "perplexity": float(np.exp(loss)),
        "tokens": int(weights_N.sum()),
        "error": None if error is None else float(error),
    }


def own_expert(names: tuple[str, ...], domain: str) -> int:
    """Id of the expert named like a domain; ConfigError when there is none."""
    require(domain in names, f"arm own_domain: no expert is named {domain!r}; experts: {', '.join(names)}")
    return names.index(domain)


def one_route(expert: int, ids_BT: np.ndarray, put) -> Masked:
    """Every token to one expert."""
    return Masked(put(np.full(ids_BT.shape, expert, np.int32)))
