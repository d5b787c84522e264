"""Activation statistics -> expert table -> permuted channel bank. Pure NumPy; METHOD.md, sections 2 and 5.

In: the folder of a dense model and the statistics of `calibrate`. Out: the same model with its FFN channels reordered
(still a valid dense checkpoint) plus `readme.experts`, the sorted channel ids of every expert in every layer.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from readme_jax import artifacts, hf
from readme_jax.config import ArtifactError, CheckpointError, ExpertConfig, ModelConfig, RouterConfig, require
from readme_jax.discover import DiscoverConfig, discover, top
from readme_jax.routing import membership
from readme_jax.statistics import Importance, Statistics, importance, load_statistics, load_windows, merged
from readme_jax.statistics import save_statistics as save_statistics

EXPERTS = "readme.experts"
SHARD_BYTES = 512 << 20  # a shard is held in memory until it is full, so it bounds the peak beside one layer
BANK = ("w_gate", "w_up", "w_down", "b_gate", "b_up")  # what has one row a channel; b_down does not
TOLERANCE = 1e-5  # of the output norm: float32 sums in another order


@dataclasses.dataclass(frozen=True, kw_only=True)
class CarveConfig:
    """One carving. Every expert gets the same number of channels, round(fraction * F), in every layer."""

    model: Path
    """Folder of the dense model (result of `import`)."""
    statistics: Path
    """Folder of the activation statistics (result of `calibrate` on this model)."""
    out: Path
    """Folder to write the carved model to."""
    fraction: float = 0.5
    """Share of the FFN channels that one expert keeps, above 0 and at most 1."""
    importance: Importance = "mean_abs"
    """What ranks channels: mean |h| (paper), mean |h| times the norm of the down column, or mean share of energy."""
    carving: Literal["domain", "static", "discovered"] = "domain"
    """`domain`: one expert a domain (paper). `static`: one mask for all text, the baseline. `discovered`: experts of
    windows of text that fire alike, whatever their domain; needs statistics with windows and importance=energy."""
    discover: DiscoverConfig = DiscoverConfig()
    """How carving=discovered finds them."""
    storage: Literal["tied", "separate"] = "tied"
    """`tied`: experts are views of one FFN. `separate`: every expert owns its rows (the paper's export form)."""
    merge: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Expert name to the domains it is carved from; a domain may serve several. Empty: one expert a domain."""
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Weight of a domain where domains are averaged (static, merge), no unit; a domain not named here has 1."""

    def __post_init__(self):
        require(0 < self.fraction <= 1, f"fraction={self.fraction} must be above 0 and at most 1")
        static, discovered = self.carving == "static", self.carving == "discovered"
        require(discovered or self.discover == DiscoverConfig(), "discover: has no meaning without carving=discovered")
        energy = not discovered or self.importance == "energy"
        require(energy, f"carving=discovered ranks by kept energy: importance={self.importance} must be energy")
        require(not (self.merge and discovered), "merge: has no meaning with carving=discovered: there are no domains")
        require(not (self.merge and static), "merge: has no meaning with carving=static, which makes one expert")
        require(
            not self.weights or static or bool(self.merge), "weights: need carving=static or merge; nothing is averaged"
        )
        for name, domains in self.merge.items():
            require(bool(domains), f"merge.{name}: names no domain")
            require(len(set(domains)) == len(domains), f"merge.{name}: names a domain twice: {', '.join(domains)}")
        for name, weight in self.weights.items():
            require(0 <= weight < math.inf, f"weights.{name}={weight} must be finite and at least 0")


# ---- which channels ---------------------------------------------------------------------------


def channels_of(fraction: float, mlp: int) -> int:
    """C = round(fraction * F), a half to the even. ConfigError unless 1 <= C <= F."""
    channels = round(fraction * mlp) if math.isfinite(fraction) else 0
    require(
        1 <= channels <= mlp,
        f"fraction={fraction} of {mlp} channels gives {channels} channels, must be from 1 to {mlp}",
    )
    return channels


def choose(
    importance_MLF: np.ndarray,
    channels: int,
    carving: Literal["domain", "static"] = "domain",
    weights_M: np.ndarray | None = None,
) -> np.ndarray:
    """The expert table int32 [L, E, C]: in each layer the `channels` most important, sorted; ties to the lower id.

    `domain`: one expert a domain, E = M. `static`: E = 1, ranked by the mean over domains weighted by weights_M.
    """
    if carving == "static":
        weights_M = np.ones(len(importance_MLF)) if weights_M is None else np.asarray(weights_M, np.float64)
        importance_MLF = np.tensordot(weights_M / weights_M.sum(), importance_MLF.astype(np.float64), 1)[None]
    return top(importance_MLF, channels)


def permutation(experts_EC: np.ndarray, mlp: int) -> np.ndarray:
    """order int32 [F] for one layer: new channel i is the old channel order[i].

    Channels of equal membership lie together: those in most experts first (shared by all), those in none last; among
    groups of equal count the one with the earlier experts first; inside a group the old order stays.
    """
    member_EF = membership(experts_EC, mlp)
    keys = [*(~member_EF[::-1]), -member_EF.sum(0)]  # lexsort is stable, its last key leads
    return np.lexsort(keys).astype(np.int32)


def inverse(order_F: np.ndarray) -> np.ndarray:
    """int32 [F] that undoes `order_F`: inverse[old] = new. Raises ArtifactError when `order_F` is no permutation."""
    mlp = len(order_F)
    require(
        bool((np.bincount(order_F, minlength=mlp) == 1).all()), f"not a permutation of {mlp} channels", ArtifactError
    )
    inverse_F = np.empty(mlp, np.int32)
    inverse_F[order_F] = np.arange(mlp, dtype=np.int32)
    return inverse_F


def relabel(experts_EC: np.ndarray, order_F: np.ndarray) -> np.ndarray:
    """The table of the permuted bank: the same channels under their new ids, sorted. int32 [E, C]."""
    return np.sort(inverse(order_F)[experts_EC], axis=-1)


def overlap_statistics(experts_LEC: np.ndarray, mlp: int) -> dict:
    """How much the experts have in common, each a mean over layers, plain numbers for JSON.

    shared_share: channels in all experts / C. union_share: channels in any / F. overlap: E x E, |a and b| / C.
    pairwise_overlap: mean of overlap over pairs of different experts (1 with one expert).
    """
    member_LEF = membership(experts_LEC, mlp)
    layers, experts, channels = experts_LEC.shape
    overlap_EE = np.zeros((experts, experts))
    for member_EF in member_LEF.astype(np.float32):  # counts are exact in float32 up to 2^24 channels
        overlap_EE += member_EF @ member_EF.T / channels / layers
    pairs = overlap_EE[~np.eye(experts, dtype=bool)]
    return {
        "shared_share": float(member_LEF.all(1).sum(-1).mean() / channels),
        "union_share": float(member_LEF.any(1).sum(-1).mean() / mlp),
        "pairwise_overlap": float(pairs.mean()) if experts > 1 else 1.0,
        "overlap": overlap_EE.tolist(),
    }


# ---- folders ----------------------------------------------------------------------------------

Layer = dict[str, np.ndarray]
Progress = Callable[[Iterable[int]], Iterable[int]]


def carve(config: CarveConfig, *, progress: Progress = iter) -> dict:
    """Carve the model of `config` into `config.out`, layer by layer; returns the figures put in the manifest.

    `progress` wraps the iteration over layers. Whatever is wrong with the inputs raises (ConfigError, DataError,
    ArtifactError, CheckpointError) before anything is written; a finished `out` of the same config and inputs is left
    as it is. Memory: one layer and one shard.
    """
    parents = {"model": config.model, "statistics": config.statistics}
    if artifacts.finished(config.out, "carve", config, parents):
        return artifacts.read_manifest(config.out)["info"]
    cfg, carved, _ = hf.read_config(config.model)
    require(carved is None, f"model={config.model}: is carved already; carve the dense model it came from")
    reader = hf.Reader(config.model)
    hf.check(reader, cfg)
    channels = channels_of(config.fraction, cfg.mlp)
    stats, found = _by_expert(load_statistics(config.statistics), cfg, config), {}
    names = stats.names
    if config.carving == "discovered":
        dense_LEC, found["discovered"] = _discovered(config, names, (cfg.layer, cfg.mlp), channels)
        names = tuple(f"expert{e}" for e in range(dense_LEC.shape[1]))
    else:
        norm_LF = _down_norms(reader, cfg) if config.importance == "mean_abs_norm" else None
        dense_LEC = choose(importance(stats, config.importance, norm_LF), channels)
    rows_LF = np.stack([permutation(experts_EC, cfg.mlp) for experts_EC in dense_LEC])
    table_LEC = np.stack([relabel(experts_EC, rows_F) for experts_EC, rows_F in zip(dense_LEC, rows_LF)])
    if config.storage == "separate":
        rows_LF = np.take_along_axis(rows_LF, table_LEC.reshape(cfg.layer, -1), axis=1)
        table_LEC = separate_table(table_LEC)
    experts = ExpertConfig(
        experts=len(names),
        channels=channels,
        storage=config.storage,
        names=names,
        importance=config.importance,
        carving=config.carving,
    )
    with artifacts.building(config.out, "carve", config, parents) as work:
        error = _write(work.path, reader, cfg, experts, None, dense_LEC, rows_LF, table_LEC, progress)
        work.info |= {"names": list(names), "channels": channels, "mlp": cfg.mlp, "error": error, **found}
        work.info |= overlap_statistics(dense_LEC, cfg.mlp)
    return work.info


def to_separate(folder: Path, out: Path, *, progress: Progress = iter) -> None:
    """Write the tied carved (or tuned) model of `folder` with separate storage: every expert owns its C rows.

    Rows lie expert-major, F = E * C, experts[l, e] = e * C + arange(C); router and attention are copied. ConfigError
    when the model is dense, separate already or an exported folder; otherwise as `carve`.
    """
    config, parents = {"storage": "separate"}, {"model": folder}
    if artifacts.finished(out, "separate", config, parents):
        return
    cfg, experts, router = hf.read_config(folder)
    require(experts is not None, f"model={folder}: is dense, there are no experts to separate")
    assert experts is not None
    require(experts.storage == "tied", f"model={folder}: storage={experts.storage} already")
    require(not (folder / "modeling_readme.py").is_file(), f"model={folder}: is an export; separate what it came from")
    reader = hf.Reader(folder)
    hf.check(reader, cfg, experts, router)
    tied_LEC = np.array(reader.get(EXPERTS))
    experts = dataclasses.replace(experts, storage="separate")
    with artifacts.building(out, "separate", config, parents) as work:
        rows_LF = tied_LEC.reshape(cfg.layer, -1)
        _write(work.path, reader, cfg, experts, router, tied_LEC, rows_LF, separate_table(tied_LEC), progress)


def recarve(folder: Path, out: Path, learned_LEC: np.ndarray, *, progress: Progress = iter) -> dict:
    """Write the tied model of `folder` with other experts, int32 [L, E, C] of its own channel ids, into the folder
    `out`: channels permuted anew, checked layer by layer as in `carve`; the router is copied. Returns figures."""
    cfg, experts, router = hf.read_config(folder)
    assert experts is not None
    rows_LF = np.stack([permutation(experts_EC, cfg.mlp) for experts_EC in learned_LEC])
    table_LEC = np.stack([relabel(experts_EC, rows_F) for experts_EC, rows_F in zip(learned_LEC, rows_LF)])
    experts = dataclasses.replace(experts, carving="learned")
    error = _write(out, hf.Reader(folder), cfg, experts, router, learned_LEC, rows_LF, table_LEC, progress)
    figures = {"names": list(experts.names), "channels": experts.channels, "mlp": cfg.mlp, "error": error}
    return figures | overlap_statistics(learned_LEC, cfg.mlp)


def separate_table(experts_LEC: np.ndarray) -> np.ndarray:
    """int32 [L, E, C] of separate storage: expert e owns rows e * C to e * C + C - 1 in every layer."""
    own_EC = np.arange(experts_LEC[0].size, dtype=np.int32).reshape(experts_LEC.shape[1:])
    return np.repeat(own_EC[None], len(experts_LEC), axis=0)


def take_rows(array: np.ndarray, rows_R: np.ndarray) -> np.ndarray:
    """array[rows_R]. A transposed view (w_down in the file's order) is gathered as it lies and stays transposed."""
    return array[rows_R] if array.flags.c_contiguous else np.take(array.T, rows_R, axis=-1).T


def check_layer(where: str, dense: Layer, stored: Layer, dense_EC: np.ndarray, stored_EC: np.ndarray) -> float:
    """Compare the stored FFN with the one it came from on random inputs; the largest difference / output norm.

    Every expert must have exactly C distinct channels and give what its channels give in `dense`. A tied bank, which
    has the dense width, must also give the dense output with all channels on. Float32. CheckpointError when a
    difference is above TOLERANCE (or not a number: the weights are).
    """
    old_F, new_F = len(dense["w_down"]), len(stored["w_down"])
    old_KF, new_KF = membership(dense_EC, old_F), membership(stored_EC, new_F)
    channels = dense_EC.shape[1]
    exact = (old_KF.sum(1) == channels).all() and (new_KF.sum(1) == channels).all()
    require(bool(exact), f"{where}: an expert has not exactly {channels} distinct channels", CheckpointError)
    if old_F == new_F:
        old_KF, new_KF = (np.vstack([member_KF, np.ones_like(member_KF[:1])]) for member_KF in (old_KF, new_KF))
    x_BD = np.random.default_rng(0).standard_normal((4, dense["w_down"].shape[1]), np.float32)
    expected_KBD, got_KBD = _ffn(x_BD, dense, old_KF), _ffn(x_BD, stored, new_KF)
    size_K = np.linalg.norm(expected_KBD.reshape(len(old_KF), -1), axis=1)
    error_K = np.linalg.norm((got_KBD - expected_KBD).reshape(len(old_KF), -1), axis=1)
    good = bool((error_K <= TOLERANCE * size_K).all())
    require(good, f"{where}: the carved FFN differs from the dense one by {error_K} of {size_K}", CheckpointError)
    return float((error_K / np.maximum(size_K, np.finfo(np.float32).tiny)).max())


def _ffn(x_BD: np.ndarray, bank: Layer, keep_KF: np.ndarray, block: int = 4096) -> np.ndarray:
    """Output [K, B, D] of the FFN without b_down, once for every set of kept channels; `block` channels at a time."""
    sets, batch = len(keep_KF), len(x_BD)
    out_KBD = np.zeros((sets * batch, x_BD.shape[1]), np.float32)
    for start in range(0, keep_KF.shape[1], block):
        rows = slice(start, start + block)
        part = {name: bank[name][rows].astype(np.float32) for name in BANK if name in bank}
        gate_BF = x_BD @ part["w_gate"].T + part.get("b_gate", np.float32(0))
        up_BF = x_BD @ part["w_up"].T + part.get("b_up", np.float32(0))
        h_BF = 0.5 * gate_BF * (1 + np.tanh(0.5 * gate_BF)) * up_BF  # silu without the overflow of exp
        h_KBF = h_BF * keep_KF[:, None, rows]
        out_KBD += h_KBF.reshape(sets * batch, -1) @ part["w_down"]  # one matmul: NumPy batches by a loop
    return out_KBD.reshape(sets, *x_BD.shape)


def _by_expert(stats: Statistics, cfg: ModelConfig, config: CarveConfig) -> Statistics:
    """The statistics with one entry an expert, after the checks that need the model."""
    layers, mlp = stats.abs_MLF.shape[1:]
    require(
        (layers, mlp) == (cfg.layer, cfg.mlp),
        f"statistics={config.statistics}: {layers} layers of {mlp} channels, "
        f"model={config.model} has {cfg.layer} of {cfg.mlp}",
    )
    if config.carving == "static":
        return merged(stats, {"static": stats.names}, config.weights)
    return merged(stats, config.merge or {name: (name,) for name in stats.names}, config.weights)


def _discovered(
    config: CarveConfig, domains: tuple[str, ...], shape_LF: tuple[int, int], channels: int
) -> tuple[np.ndarray, dict]:
    """The table of `discover` on the windows of the statistics, and what to tell of it."""
    windows = load_windows(config.statistics)
    stored = windows.share_WLF.shape[1:]
    require(stored == shape_LF, f"statistics={config.statistics}: windows of {stored}, model={config.model} {shape_LF}")
    table_LEC, owner_W, rounds = discover(config.discover, windows, channels)
    count_ME = np.zeros((len(domains), table_LEC.shape[1]), np.int64)
    np.add.at(count_ME, (windows.domain_W, owner_W), 1)
    by_domain = dict(zip(domains, count_ME.tolist(), strict=True))
    return table_LEC, {"rounds": rounds, "settled": rounds[-1]["moved"] == 0, "windows": by_domain}


def _down_norms(reader: hf.Reader, cfg: ModelConfig) -> np.ndarray:
    """||w_down_j|| float32 [L, F]."""
    layers = (layer["w_down"].astype(np.float32) for _, layer in hf.iter_layers(reader, cfg))
    return np.stack([np.linalg.norm(w_down_FD, axis=1) for w_down_FD in layers])


def _write(
    folder: Path,
    reader: hf.Reader,
    cfg: ModelConfig,
    experts: ExpertConfig,
    router: RouterConfig | None,
    old_LEC: np.ndarray,
    rows_LF: np.ndarray,
    new_LEC: np.ndarray,
    progress: Progress,
) -> float:
    """Stream the model of `reader` into `folder` with the bank's rows taken in the order rows_LF; check every layer.

    old_LEC are the experts among the rows read, new_LEC among those written. Returns the largest relative error.
    """
    new_cfg, error = dataclasses.replace(cfg, mlp=rows_LF.shape[1]), 0.0
    base = json.loads((reader.folder / "config.json").read_text())
    data = hf.config_to_hf(new_cfg, base, experts, router)
    with hf.Writer(folder, SHARD_BYTES) as writer:
        hf.write_top(writer, cfg, hf.read_top(reader, cfg))
        for i in progress(range(cfg.layer)):
            old = hf.read_layer(reader, cfg, i)
            new = {name: take_rows(array, rows_LF[i]) if name in BANK else array for name, array in old.items()}
            error = max(error, check_layer(f"{reader.folder}: layer {i}", old, new, old_LEC[i], new_LEC[i]))
            hf.write_layer(writer, new_cfg, i, new)
        hf.write_moe(writer, new_LEC)
        for name in reader.names():
            if name.startswith("readme.router."):
                writer.add(name, reader.get(name))
    hf.copy_side_files(reader.folder, folder)
    artifacts.write_text(folder / "config.json", json.dumps(data, indent=2) + "\n")
    return error


def describe(info: dict) -> str:
    """Three lines for a terminal from the figures that `carve` returns."""
    names, channels, mlp = info["names"], info["channels"], info["mlp"]
    discovered = ""
    if "discovered" in info:
        rounds = info["discovered"]["rounds"]
        first, last = rounds[0], rounds[-1]
        settled = "settled" if info["discovered"]["settled"] else f"{last['moved']:.1%} of windows still moving"
        load = f"load max/mean {last['load_max_over_mean']:.2f}"
        discovered = f"{len(rounds)} rounds, {settled}: kept energy {first['kept']:.2%} to {last['kept']:.2%}, {load}\n"
    return discovered + (
        f"{len(names)} expert(s) of {channels} of {mlp} channels: {', '.join(names)}\n"
        f"in all experts {info['shared_share']:.0%} of an expert, in any {info['union_share']:.0%} of the FFN, "
        f"mean pairwise overlap {info['pairwise_overlap']:.0%}\n"
        f"checked: permutations invertible, experts exact, carved = dense FFN to {info['error']:.1e} of its norm"
    )
