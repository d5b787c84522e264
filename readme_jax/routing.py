"""Expert tables and routing plans on the host: pure NumPy.

Expert ids are known before the backbone runs, so one plan serves all layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from readme_jax.config import require

RUNGS = 24  # of a ladder, and so programs that one batch shape may compile
PREPARED = 12  # of them that are compiled ahead, at most
MARGIN = 3  # rungs above what was seen that are


def membership(experts_LEC: np.ndarray, width: int) -> np.ndarray:
    """bool [L, E, width]: expert e of layer l has channel j. Leading axes may be missing ([E, C] -> [E, width])."""
    member = np.zeros((*experts_LEC.shape[:-1], width), bool)
    np.put_along_axis(member, experts_LEC.astype(np.int64), True, axis=-1)
    return member


def bucket(value: int, step: int) -> int:
    """Round up to a small ladder of sizes: multiples of `step` up to 8 steps, then four rungs to each power of two."""
    units = -(-max(value, 1) // step)
    if units <= 8:
        return units * step
    rung = 1 << (units.bit_length() - 3)
    return -(-units // rung) * rung * step


def group(expert_M: np.ndarray, experts: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order flat tokens by expert into groups of `rows` rows, each of one expert; nothing is dropped.

    expert_M: int32 expert of each of M tokens. Returns (source_PR, expert_P, row_M), see `models.experts.Grouped`;
    P is rounded up to a bucket so that few shapes compile; spare groups are empty and name expert 0.
    """
    count_E = np.bincount(expert_M, minlength=experts)
    groups_E = -(-count_E // rows)
    total = bucket(int(groups_E.sum()), 1)
    order_M = np.argsort(expert_M, kind="stable")
    first_row_E = np.concatenate([[0], np.cumsum(groups_E)[:-1]]) * rows
    first_token_E = np.concatenate([[0], np.cumsum(count_E)[:-1]])
    sorted_M = expert_M[order_M]
    place_M = first_row_E[sorted_M] + np.arange(len(expert_M)) - first_token_E[sorted_M]
    source_PR = np.full(total * rows, len(expert_M), np.int32)
    source_PR[place_M] = order_M
    row_M = np.empty(len(expert_M), np.int32)
    row_M[order_M] = place_M
    expert_P = np.zeros(total, np.int32)
    expert_P[: groups_E.sum()] = np.repeat(np.arange(experts), groups_E)
    return source_PR.reshape(total, rows), expert_P, row_M


def group_rows(tokens: int, experts: int) -> int:
    """Rows of a group for `tokens` tokens: 1/(2E) of them keeps padding below half of an expert's share and the groups
    few."""
    return max(32, -(-tokens // (2 * experts) // 32) * 32)


def group_counts(tokens: int, experts: int, rows: int) -> list[int]:
    """All numbers of groups that `group` can make of `tokens` tokens, ascending."""
    most = (tokens + experts * (rows - 1)) // rows  # every expert leaves all of a group but a row empty
    return sorted({bucket(count, 1) for count in range(-(-tokens // rows), most + 1)})


class Exchange(NamedTuple):
    """How the tokens of a batch reach their experts and come back: host arrays, int32, see `models.parallel.Parallel`
    for what each holds.

    A microbatches, G = data * X batch devices, X peers on the mesh's `expert` axis, S rows for each pair of them, P
    blocks of R rows, E / X experts on a device. The last three are None where a device holds one expert: its rows
    arrive in order.
    """

    send_AGXS: Any
    place_ABT: Any
    group_AGPR: Any = None
    ungroup_AGXS: Any = None
    blocks_AGE: Any = None


def ladder(tokens: int, peers: int) -> tuple[int, ...]:
    """Sizes S of the rows a device sends to each of `peers` devices, at `tokens` tokens a device: at most RUNGS.

    The last one is `tokens`, so no skew drops a token. With n = tokens / peers, the mean, a balanced router needs
    about n + 2.4 sqrt(n) rows, the largest of many binomial counts: the rungs lie closest there, then a few percent
    apart up to 3n, then coarsely. Multiples of 2 rows, of 4 from 128 rows on.
    """
    if peers == 1:
        return (tokens,)
    mean = tokens / peers
    low, high = mean + 1.6 * mean**0.5, mean + 3.0 * mean**0.5
    skewed = min(max(3 * mean, high), tokens)

    def up(sizes) -> set[int]:
        steps = np.where(sizes < 128, 2, 4)
        return set(np.minimum(tokens, -(-sizes // steps) * steps).astype(int).tolist())

    rungs = up(np.linspace(low, high, 6)) | up(np.geomspace(high, skewed, 14)[1:])
    return tuple(sorted(rungs | up(np.geomspace(skewed, tokens, RUNGS - len(rungs) + 1)[1:])))


def likely(needs: list[int], tokens: int, peers: int) -> tuple[int, ...]:
    """The sizes to compile ahead, ascending, by what some batches need (`largest_pair`): from the rung of the smallest
    need to MARGIN rungs above that of the largest; where these are more than PREPARED, that many of them, evenly."""
    sizes = ladder(tokens, peers)
    low, high = np.searchsorted(sizes, [min(needs), max(needs)])
    high = min(high + MARGIN, len(sizes) - 1)
    chosen = np.linspace(low, high, min(high - low + 1, PREPARED)).round().astype(int)
    return tuple(sizes[rung] for rung in chosen)


def largest_pair(expert_ABT: np.ndarray, experts: int, *, data: int, peers: int) -> int:
    """Rows that the most loaded pair of devices exchanges in a batch of host expert ids (see `exchange`)."""
    n = expert_ABT.shape[0] * data * peers
    owner_NM = expert_ABT.reshape(n, -1) // (experts // peers)
    flat_NM = owner_NM + np.arange(0, n * peers, peers)[:, None]
    return int(np.bincount(flat_NM.ravel()).max())


def block_rows(rows: int, local: int) -> int:
    """Rows R of the blocks into which a device groups `rows` received rows of `local` experts.

    Each expert's rows are filled up to whole blocks, so blocks are an eighth of an expert's share at most; 512 rows
    keep any matrix unit busy.
    """
    return min(512, -(-rows // (8 * local * 8)) * 8)


def exchange_shapes(shape_ABT: tuple[int, int, int], experts: int, *, data: int, peers: int, rows: int) -> Exchange:
    """Shapes of the plan that sends `rows` rows between two peers, in place of its arrays."""
    a, b, t = shape_ABT
    check_split(experts, peers)
    require(b % (data * peers) == 0, f"batch={b} must be a multiple of the mesh's {data * peers} batch devices")
    devices, local = data * peers, experts // peers
    sent = (a, devices, peers, rows)
    if local == 1:
        return Exchange(sent, shape_ABT)
    r = block_rows(peers * rows, local)
    return Exchange(sent, shape_ABT, (a, devices, (peers * rows + local * (r - 1)) // r, r), sent, (a, devices, local))


def exchange(
    expert_ABT: np.ndarray,
    experts: int,
    *,
    data: int = 1,
    peers: int = 1,
    rows: int | None = None,
    compiled: Sequence[int] = (),
    real_ABT: np.ndarray | None = None,
) -> Exchange:
    """The plan of `parallel` experts for a batch of host expert ids, the same for all layers; nothing is dropped.

    Batch rows lie on the devices of (data, expert) in order, and device x of the `expert` axis holds experts
    x * E / X to (x + 1) * E / X - 1. `rows` asks for at least this rung of the ladder. Of the sizes `compiled`
    (ascending) the first that suffices is taken, and where none does the ladder's. real_ABT: bool, tokens that there
    are; the others go nowhere and get zeros (None: all are). ConfigError when the experts are no multiple of `peers`,
    the batch none of data * peers, or an id is no expert.
    """
    a, b, t = expert_ABT.shape
    check_split(experts, peers)
    low, high = int(expert_ABT.min()), int(expert_ABT.max())
    require(0 <= low and high < experts, f"expert ids {low}..{high} must lie in 0..{experts - 1}")
    n, m, local = a * data * peers, b * t // (data * peers), experts // peers
    # ids of 8 or 16 bits: NumPy sorts those by radix
    id_NM = expert_ABT.reshape(n, -1).astype(np.uint8 if experts < 256 else np.uint16)
    if real_ABT is not None:
        id_NM = np.where(real_ABT.reshape(n, -1), id_NM, id_NM.dtype.type(experts))  # behind all others
    order_NM = np.argsort(id_NM, axis=-1, kind="stable").astype(np.int32)
    flat_NM = id_NM + np.arange(0, n * (experts + 1), experts + 1, dtype=np.int32)[:, None]
    count_NE = np.bincount(flat_NM.ravel(), minlength=n * (experts + 1)).astype(np.int32).reshape(n, -1)[:, :-1]
    pair_NX = count_NE.reshape(n, peers, local).sum(-1, dtype=np.int32)
    need = max(int(pair_NX.max()), rows or 0)
    size = next(size for size in (*compiled, *ladder(m, peers)) if size >= need)
    shapes = exchange_shapes(expert_ABT.shape, experts, data=data, peers=peers, rows=size)
    # ---- a token of rank r among those sorted by expert takes row r - (first rank of its device) of its device's rows
    device_N = np.arange(n, dtype=np.int32)
    shift_NX = size * np.arange(peers, dtype=np.int32) - _before(pair_NX)
    going_N = pair_NX.sum(-1, dtype=np.int32)
    sender = np.repeat(device_N, going_N)
    rank = np.arange(len(sender), dtype=np.int32) - np.repeat(_before(going_N), going_N)
    slot = np.repeat(shift_NX.ravel(), pair_NX.ravel()) + rank
    token = order_NM[sender, rank]
    send_NQ = np.full((n, peers * size), m, np.int32)
    send_NQ[sender, slot] = token
    place_NM = np.full((n, m), peers * size, np.int32)
    place_NM[sender, token] = slot
    sent = (send_NQ.reshape(shapes.send_AGXS), place_NM.reshape(shapes.place_ABT))
    if shapes.group_AGPR is None:
        return Exchange(*sent)
    # ---- device j receives c[i, e] rows from each peer i for its expert e, sorted by e; it groups them by (e, i)
    p, r = shapes.group_AGPR[2:]
    count_KIJE = count_NE.reshape(a * data, peers, peers, local)
    first_KIJE = _before(count_KIJE) + size * np.arange(peers, dtype=np.int32)[:, None, None]
    count_NEX, first_NEX = (c.transpose(0, 2, 3, 1).reshape(n, local, peers) for c in (count_KIJE, first_KIJE))
    count_NE = count_NEX.sum(-1, dtype=np.int32)  # received now, not sent
    blocks_NE = -(-count_NE // r)
    start_NEX = r * _before(blocks_NE)[:, :, None] + _before(count_NEX)
    count_Z = count_NEX.ravel()
    within = np.arange(len(sender), dtype=np.int32) - np.repeat(_before(count_Z), count_Z)
    source, target = (np.repeat(first.ravel(), count_Z) + within for first in (first_NEX, start_NEX))
    owner = np.repeat(device_N, count_NE.sum(-1))
    group_NW = np.full((n, p * r), peers * size, np.int32)
    group_NW[owner, target] = source
    ungroup_NQ = np.full((n, peers * size), p * r, np.int32)
    ungroup_NQ[owner, source] = target
    grouped = (a.reshape(shape) for a, shape in zip((group_NW, ungroup_NQ, blocks_NE), shapes[2:]))
    return Exchange(*sent, *grouped)


def _before(count: np.ndarray) -> np.ndarray:
    """int32 sum of what stands before each entry on the last axis."""
    return np.cumsum(count, -1, dtype=np.int32) - count


def check_split(experts: int, peers: int) -> None:
    """ConfigError unless the experts spread evenly over the mesh's `expert` axis."""
    require(experts % peers == 0, f"experts={experts} must be a multiple of the mesh's expert={peers}")
