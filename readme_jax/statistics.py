"""Activation statistics of the FFN channels by domain: their file, means over domains, importance of a channel.

Written by `calibrate`, read by `carve`. Pure NumPy.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
from safetensors.numpy import save

from readme_jax.config import ArtifactError, DataError, require

STATISTICS = "statistics.safetensors"
WINDOWS = "windows.safetensors"
SHARES = "windows.npy"  # apart, to be mapped: an hour of calibration of a 7B model has more than a host holds

Importance = Literal["mean_abs", "mean_abs_norm", "energy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Activation statistics of h = silu(x Wg) * (x Wu), the input of down_proj, by domain, layer and channel.

    names: the M domains. Arrays float32 [M, L, F], means over the domain's tokens: abs_MLF of |h|, square_MLF of h^2,
    mean_MLF of h, share_MLF of the token's share h_j^2 ||w_j||^2 / sum_k h_k^2 ||w_k||^2. tokens_M int64: tokens seen.
    """

    names: tuple[str, ...]
    abs_MLF: np.ndarray
    square_MLF: np.ndarray
    mean_MLF: np.ndarray
    share_MLF: np.ndarray
    tokens_M: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The four [M, L, F] arrays by field name."""
        return {name: getattr(self, name) for name in ("abs_MLF", "square_MLF", "mean_MLF", "share_MLF")}


def save_statistics(stats: Statistics, folder: Path) -> None:
    """Write `statistics.safetensors` into `folder`: float32 arrays, tokens int64, domain names in the metadata."""
    tensors: dict[str, np.ndarray] = {name: np.ascontiguousarray(a, np.float32) for name, a in stats.arrays().items()}
    tensors["tokens_M"] = np.ascontiguousarray(stats.tokens_M, np.int64)
    # save_file of the library loses the error number of a full disk
    (Path(folder) / STATISTICS).write_bytes(save(tensors, metadata={"names": json.dumps(list(stats.names))}))


def load_statistics(folder: Path) -> Statistics:
    """Read what `save_statistics` wrote. ArtifactError when it is missing, damaged, misshapen or not finite."""
    path = Path(folder) / STATISTICS
    require(path.is_file(), f"{path}: no such file; run calibrate first", ArtifactError)
    fields = ("abs_MLF", "square_MLF", "mean_MLF", "share_MLF", "tokens_M")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = tuple(json.loads((file.metadata() or {})["names"]))
            values = {name: file.get_tensor(name) for name in fields}
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable as statistics: {' '.join(str(error).split())}") from None
    shape = values["abs_MLF"].shape
    require(len(shape) == 3 and shape[0] == len(names), f"{path}: abs_MLF is {shape}, not [M, L, F]", ArtifactError)
    require(len(set(names)) == len(names) > 0, f"{path}: domain names {names} are not distinct", ArtifactError)
    for name, value in values.items():
        expected = shape[:1] if name == "tokens_M" else shape
        require(value.shape == expected, f"{path}: {name} is {value.shape}, expected {expected}", ArtifactError)
        require(bool(np.isfinite(value).all()), f"{path}: {name} holds values that are not finite", ArtifactError)
    return Statistics(names=names, **values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """What fires in short runs of calibration tokens: W windows of up to S tokens, in the order of the records.

    share_WLF: float16, the mean over a window's tokens of a channel's share of the FFN output's energy, times F (1: an
    even share); it may be mapped from a file. ids_WS: int32 token ids, -1 past the end. domain_W: int32 place of the
    domain in the statistics' names. previous_W: int32 window before it in the same record, -1 for none.
    """

    share_WLF: np.ndarray
    ids_WS: np.ndarray
    domain_W: np.ndarray
    previous_W: np.ndarray

    @property
    def tokens_W(self) -> np.ndarray:
        """Tokens of each window, at least 1."""
        return (self.ids_WS >= 0).sum(-1)


def cut_windows(
    folder: Path, records: Mapping[str, tuple[np.ndarray, np.ndarray]], size: int, shape_LF: tuple[int, int]
) -> Windows:
    """Lay the windows' files out in `folder` for calibration to fill share_WLF; one that is there is gone on with.

    records: by domain, ids and segments [N, T]. Each record is cut every `size` tokens, padding (segment 0, at its end)
    left out, whatever documents it is packed of.
    """
    ids, domains, previous, total = [], [], [], 0
    for domain, (ids_NT, segments_NT) in enumerate(records.values()):
        for ids_T, segments_T in zip(ids_NT, segments_NT):
            count = -(-int(np.count_nonzero(segments_T)) // size)
            padded = np.full(-(-len(ids_T) // size) * size, -1, np.int32)
            padded[: len(ids_T)] = np.where(segments_T > 0, ids_T, -1)
            ids.append(padded.reshape(-1, size)[:count])
            domains.append(np.full(count, domain, np.int32))
            previous.append(np.arange(total - 1, total + count - 1, dtype=np.int32))
            previous[-1][:1] = -1
            total += count
    arrays = {"ids_WS": ids, "domain_W": domains, "previous_W": previous}
    arrays = {name: np.concatenate(parts) for name, parts in arrays.items()}
    (Path(folder) / WINDOWS).write_bytes(save(arrays))
    path, shape = Path(folder) / SHARES, (total, *shape_LF)
    try:
        there = np.load(path, mmap_mode="r").shape == shape
    except (OSError, ValueError, EOFError):  # missing, or cut off while it was laid out
        there = False
    if not there:
        np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    return Windows(share_WLF=np.load(path, mmap_mode="r+"), **arrays)


def load_windows(folder: Path) -> Windows:
    """Map what calibration with `window` above 0 wrote. ArtifactError when it is missing, damaged or misshapen."""
    folder = Path(folder)
    for name in (WINDOWS, SHARES):
        require((folder / name).is_file(), f"{folder / name}: no such file; calibrate with window=16", ArtifactError)
    try:
        with safetensors.safe_open(folder / WINDOWS, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in ("ids_WS", "domain_W", "previous_W")}
        share_WLF = np.load(folder / SHARES, mmap_mode="r")
    except (safetensors.SafetensorError, ValueError, EOFError) as error:
        raise ArtifactError(f"{folder}: windows not readable: {' '.join(str(error).split())}") from None
    count = len(share_WLF)
    good = share_WLF.ndim == 3 and all(len(a) == count for a in arrays.values()) and count > 0
    require(good, f"{folder / SHARES}: is {share_WLF.shape}, not [W, L, F] of {WINDOWS}", ArtifactError)
    return Windows(share_WLF=share_WLF, **arrays)


def merged(stats: Statistics, groups: Mapping[str, Sequence[str]], weights: Mapping[str, float]) -> Statistics:
    """One entry a group: the weighted mean of its domains' statistics (float64), tokens added up.

    A domain missing in `weights` weighs 1. ConfigError on an unknown domain or weights that are all 0; DataError on a
    domain without tokens: its means mean nothing.
    """
    for key, domain in [
        *((f"weights.{n}", n) for n in weights),
        *((f"merge.{g}", d) for g in groups for d in groups[g]),
    ]:
        require(
            domain in stats.names, f"{key}: no domain {domain!r} in the statistics; known: {', '.join(stats.names)}"
        )
    rows, tokens = {name: [] for name in stats.arrays()}, []
    for group, domains in groups.items():
        ids = [stats.names.index(d) for d in domains]
        for i in ids:
            require(
                stats.tokens_M[i] > 0, f"domain {stats.names[i]}: 0 calibration tokens, at least 1 needed", DataError
            )
        weight = np.array([weights.get(d, 1.0) for d in domains], np.float64)
        require(weight.sum() > 0, f"weights: every domain of expert {group} has weight 0")
        for name, array_MLF in stats.arrays().items():
            rows[name].append(np.tensordot(weight / weight.sum(), array_MLF[ids].astype(np.float64), 1))
        tokens.append(stats.tokens_M[ids].sum())
    arrays = {name: np.stack(r) for name, r in rows.items()}
    return Statistics(names=tuple(groups), **arrays, tokens_M=np.array(tokens, np.int64))


def importance(stats: Statistics, kind: Importance, norm_LF: np.ndarray | None = None) -> np.ndarray:
    """How much a channel matters to a domain, [M, L, F], larger is more. norm_LF: ||w_down_j||, for mean_abs_norm."""
    if kind == "mean_abs":
        return stats.abs_MLF
    if kind == "energy":
        return stats.share_MLF
    assert norm_LF is not None, "mean_abs_norm needs the norms of the down columns"
    return stats.abs_MLF * norm_LF
