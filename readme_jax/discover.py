"""Experts found in the text, without domain names: Lloyd's iterations on kept energy (METHOD 5, point 4). Pure NumPy.

Each round gives every calibration window to an expert, under a limit of load, and then every expert, in each layer, the
channels with most energy in its windows. A window's value in an expert is the energy it keeps there, and, where wanted,
how well a cheap predictor foresees the expert from token ids: what the router cannot foresee is lost.
"""

import dataclasses

import numpy as np

from readme_jax.config import require
from readme_jax.routing import membership
from readme_jax.statistics import Windows

STEPS = 10_000  # of the spread of values in a price: an assignment is within W / STEPS of the best one
SMOOTHING = 0.01  # tokens of each id that every expert is taken to have had
BLOCK = 1 << 28  # bytes of shares in float32 at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscoverConfig:
    """How `carving=discovered` groups the calibration windows."""

    experts: int = 0
    """How many. 0: as many as domains, and the experts of the domains are where it starts; else the start is spread
    over the windows as in k-means++ (Arthur and Vassilvitskii 2007)."""
    rounds: int = 30
    """Most rounds; fewer when no window moves any more."""
    cap: float = 1.3
    """Largest load of an expert over the mean load, in windows."""
    predictability: float = 0.0
    """Share of energy that a nat of the predictor's log probability of the expert is worth. 0: the expert need not be
    foreseen. 0.02 weighs both as energy labels of temperature 0.02 do."""
    seed: int = 0
    """Seed of a spread start."""

    def __post_init__(self):
        require(self.experts >= 0, f"experts={self.experts} must not be negative")
        require(self.rounds >= 1, f"rounds={self.rounds} must be at least 1")
        require(self.cap >= 1, f"cap={self.cap} must be at least 1: the mean load cannot be above all loads")
        require(0 <= self.predictability < np.inf, f"predictability={self.predictability} must be finite and >= 0")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must be in 0 .. 2**32 - 1")


def discover(config: DiscoverConfig, windows: Windows, channels: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """(expert table int32 [L, E, C], expert int32 [W] of each window, figures of each round).

    Figures: kept, the mean share of energy that windows keep (weighted by their tokens); moved, the share of windows
    that changed their expert; load_max_over_mean, by windows; and with predictability, nats, the predictor's mean
    cross-entropy. Without predictability `kept` never falls (but for 1 / STEPS of its spread).
    """
    weight_W = windows.tokens_W / windows.tokens_W.mean()
    domains = int(windows.domain_W.max()) + 1
    experts = config.experts or domains
    require(experts <= len(weight_W), f"experts={experts}: only {len(weight_W)} windows; calibrate on more")
    capacity = int(np.ceil(len(weight_W) * config.cap / experts))
    if config.experts:
        table_LEC = spread(windows, experts, channels, np.random.default_rng(config.seed))
    else:
        table_LEC = top(means(windows, windows.domain_W, domains), channels)
    owner_W, rounds = np.full(len(weight_W), -1), []
    for number in range(config.rounds):
        value_WE, figures = kept_energy(windows, table_LEC), {}
        kept_WE = value_WE
        if config.predictability and number:
            foreseen_WE = predict(windows, owner_W, experts)
            figures["nats"] = float(-np.take_along_axis(foreseen_WE, owner_W[:, None], 1).mean())
            value_WE = value_WE + config.predictability * foreseen_WE
        before_W, owner_W = owner_W, assign(weight_W[:, None] * value_WE, capacity)
        moved = float((owner_W != before_W).mean())
        kept = float((weight_W * np.take_along_axis(kept_WE, owner_W[:, None], 1)[:, 0]).mean())
        load = np.bincount(owner_W, minlength=experts).max() * experts / len(owner_W)
        rounds.append({"kept": kept, "moved": moved, "load_max_over_mean": float(load)} | figures)
        if moved == 0:
            break
        table_LEC = refill(windows, top(means(windows, owner_W, experts), channels), owner_W, table_LEC)
    return table_LEC, owner_W.astype(np.int32), rounds


def top(share_ELF: np.ndarray, channels: int) -> np.ndarray:
    """int32 [L, E, C]: of each expert in each layer the channels with the largest share, sorted; ties to the lower."""
    ranked_ELF = np.argsort(-share_ELF, axis=-1, kind="stable")
    return np.sort(ranked_ELF[..., :channels], axis=-1).swapaxes(0, 1).astype(np.int32)


def _blocks(windows: Windows):
    count, *shape = windows.share_WLF.shape
    rows = max(1, BLOCK // (4 * int(np.prod(shape))))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def means(windows: Windows, owner_W: np.ndarray, experts: int) -> np.ndarray:
    """float32 [E, L, F]: mean share of the tokens of each expert's windows, as stored; 0 for an expert of none."""
    member_EW = (owner_W == np.arange(experts)[:, None]) * windows.tokens_W.astype(np.float32)
    member_EW /= np.maximum(member_EW.sum(1, keepdims=True), 1)
    count, *shape = windows.share_WLF.shape
    sums_EJ = np.zeros((experts, int(np.prod(shape))), np.float32)
    for rows in _blocks(windows):
        sums_EJ += member_EW[:, rows] @ windows.share_WLF[rows].astype(np.float32).reshape(-1, sums_EJ.shape[1])
    return sums_EJ.reshape(experts, *shape)


def kept_energy(windows: Windows, table_LEC: np.ndarray) -> np.ndarray:
    """float64 [W, E]: share of a window's energy that each expert keeps, the mean over layers."""
    layers, mlp = windows.share_WLF.shape[1:]
    member_EJ = membership(table_LEC, mlp).swapaxes(0, 1).reshape(table_LEC.shape[1], -1).astype(np.float32)
    parts = [
        windows.share_WLF[rows].astype(np.float32).reshape(-1, layers * mlp) @ member_EJ.T for rows in _blocks(windows)
    ]
    return np.concatenate(parts).astype(np.float64) / (layers * mlp)


def spread(windows: Windows, experts: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Start table int32 [L, E, C]: the channels of windows drawn one after the other, each with a chance in proportion
    to what the experts so far keep less of its energy than its own best channels."""
    layers, mlp = windows.share_WLF.shape[1:]
    best = [
        np.partition(windows.share_WLF[rows], mlp - channels, -1)[..., mlp - channels :] for rows in _blocks(windows)
    ]
    best_W = np.concatenate([part.sum((1, 2), dtype=np.float64) for part in best]) / (layers * mlp)
    chosen, lost_W = [], np.ones(len(best_W))
    for _ in range(experts):
        chosen.append(int(rng.choice(len(lost_W), p=lost_W / lost_W.sum())))
        kept_WE = kept_energy(windows, top(windows.share_WLF[chosen].astype(np.float32), channels))
        lost_W = np.maximum(best_W - kept_WE.max(1), 1e-9)  # where all windows are alike, any of them
        lost_W[chosen] = 0
    return top(windows.share_WLF[chosen].astype(np.float32), channels)


def refill(windows: Windows, table_LEC: np.ndarray, owner_W: np.ndarray, old_LEC: np.ndarray) -> np.ndarray:
    """The table with the experts that own no window given the channels of the windows that lose most, one each."""
    empty = np.setdiff1d(np.arange(table_LEC.shape[1]), owner_W)
    if len(empty):
        kept_W = np.take_along_axis(kept_energy(windows, old_LEC), owner_W[:, None], 1)[:, 0]
        worst = np.argsort(kept_W, kind="stable")[: len(empty)]
        table_LEC[:, empty] = top(windows.share_WLF[worst].astype(np.float32), table_LEC.shape[-1])
    return table_LEC


def assign(value_WE: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [W]: the expert of each window, at most `capacity` of each, with the greatest sum of values but for
    W / STEPS of their spread.

    An auction (Bertsekas 1988): a window goes where value less price is greatest. An expert with too many raises its
    price until the surplus, those that lose least by it, is better off elsewhere. An expert that has a price is full.
    """
    count, experts = value_WE.shape
    assert capacity * experts >= count
    if experts == 1:
        return np.zeros(count, np.int64)
    step = max(float(np.ptp(value_WE)), 1e-12) / STEPS
    price_E, rows_W = np.zeros(experts), np.arange(count)
    owner_W = np.argmax(value_WE, 1)
    while True:
        load_E = np.bincount(owner_W, minlength=experts)
        full = int(np.argmax(load_E))
        if load_E[full] <= capacity:
            return owner_W
        own = rows_W[owner_W == full]
        net_NE = value_WE[own] - price_E
        here_N = net_NE[:, full].copy()
        net_NE[:, full] = -np.inf
        margin_N = here_N - net_NE.max(1)
        leave = np.argsort(margin_N, kind="stable")[: len(own) - capacity]
        price_E[full] += max(margin_N[leave].max(), 0) + step
        owner_W[own[leave]] = np.argmax(net_NE[leave], 1)


def predict(windows: Windows, owner_W: np.ndarray, experts: int) -> np.ndarray:
    """float64 [W, E]: log probability of each expert for each window by naive Bayes on the ids of its tokens and of the
    window's before, each window's own ids left out of the counts it is judged by.

    Token counts are smoothed; the sum of log likelihoods is scaled by the factor, of a few, with the least
    cross-entropy, as tokens of one text are not independent.
    """
    known, number_WS = np.unique(windows.ids_WS, return_inverse=True)
    number_WS = number_WS.reshape(windows.ids_WS.shape)
    real_WS = windows.ids_WS >= 0
    vocabulary = len(known)
    count_EV = np.zeros((experts, vocabulary))
    np.add.at(count_EV, (np.broadcast_to(owner_W[:, None], real_WS.shape)[real_WS], number_WS[real_WS]), 1)
    total_E, prior_E = count_EV.sum(1), np.bincount(owner_W, minlength=experts).astype(np.float64)
    score_WE = np.empty((len(owner_W), experts))
    for w, (numbers_S, real_S, own) in enumerate(zip(number_WS, real_WS, owner_W)):
        ids, counts = np.unique(numbers_S[real_S], return_counts=True)
        seen_EV = count_EV[:, ids] + SMOOTHING
        all_E = total_E + SMOOTHING * vocabulary
        seen_EV[own] -= counts
        all_E[own] -= counts.sum()
        score_WE[w] = (counts * (np.log(seen_EV) - np.log(all_E)[:, None])).sum(1)
    earlier = windows.previous_W >= 0
    score_WE[earlier] += score_WE[windows.previous_W[earlier]]  # the right side is read before anything is written
    prior_WE = np.log(np.maximum(prior_E - np.eye(experts)[owner_W], 0) + 1)
    options = [_log_softmax(prior_WE + scale * score_WE) for scale in 2.0 ** -np.arange(8)]
    return max(options, key=lambda logp_WE: np.take_along_axis(logp_WE, owner_W[:, None], 1).sum())


def _log_softmax(x_WE: np.ndarray) -> np.ndarray:
    x_WE = x_WE - x_WE.max(1, keepdims=True)
    return x_WE - np.log(np.exp(x_WE).sum(1, keepdims=True))
