"""Expert tables and routing plans on the host: pure NumPy.

Expert ids are known before the backbone runs, so one plan serves all layers.
"""

import numpy as np


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
