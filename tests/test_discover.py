"""Discovered experts: planted clusters, the limit of load, brute force on tiny cases, the folder that carve makes."""

import itertools
import json

import jax
import numpy as np
import pytest
from stages import ONE, differing

from readme_jax import carve as carving
from readme_jax import discover as disc
from readme_jax import hf, statistics
from readme_jax.calibrate import window_means
from readme_jax.config import ArtifactError, ConfigError
from readme_jax.data import open_records
from readme_jax.discover import DiscoverConfig, discover
from readme_jax.sharding import put, spec
from readme_jax.statistics import Windows
from readme_jax.train import calibrate, carve, evaluate


def planted(rng, *, clusters=3, each=12, layers=2, mlp=24, size=4, channels=8, domains=3, vocab=30):
    """Windows whose energy lies, but for noise, on their cluster's channels; domains say nothing of clusters.

    Returns (windows, cluster [W], channels of each cluster [L, K, C])."""
    table_LKC = np.stack([
        np.sort(rng.permutation(mlp)[: clusters * channels].reshape(clusters, channels), -1) for _ in range(layers)
    ])  # fmt: skip
    cluster_W = rng.permutation(np.repeat(np.arange(clusters), each))
    share_WLF = 0.1 * rng.random((len(cluster_W), layers, mlp))
    for w, k in enumerate(cluster_W):
        for i in range(layers):
            share_WLF[w, i, table_LKC[i, k]] += rng.random(channels) + 0.5
    share_WLF *= mlp / share_WLF.sum(-1, keepdims=True)
    ids_WS = (rng.integers(0, vocab // clusters, (len(cluster_W), size)) * clusters + cluster_W[:, None]).astype(
        np.int32
    )
    return make(share_WLF, ids_WS, rng.integers(0, domains, len(cluster_W))), cluster_W, table_LKC


def make(share_WLF, ids_WS, domain_W):
    previous_W = np.full(len(ids_WS), -1, np.int32)
    return Windows(
        share_WLF=share_WLF.astype(np.float16), ids_WS=ids_WS, domain_W=domain_W.astype(np.int32), previous_W=previous_W
    )


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.mark.parametrize("seed", range(4))
def test_planted_clusters_are_found(rng, seed):
    windows, cluster_W, table_LKC = planted(rng)
    table_LEC, owner_W, rounds = discover(DiscoverConfig(experts=3, seed=seed), windows, 8)
    pairs = set(zip(owner_W.tolist(), cluster_W.tolist()))
    assert len(pairs) == 3, "an expert a cluster"
    for e, k in pairs:
        np.testing.assert_array_equal(table_LEC[:, e], table_LKC[:, k])
    assert rounds[-1]["moved"] == 0 and rounds[-1]["load_max_over_mean"] == 1


def test_domains_start_where_they_are_told(rng):
    windows, cluster_W, table_LKC = planted(rng)
    own = make(windows.share_WLF, windows.ids_WS, cluster_W)
    table_LEC, owner_W, rounds = discover(DiscoverConfig(), own, 8)
    np.testing.assert_array_equal(owner_W, cluster_W)
    np.testing.assert_array_equal(table_LEC, table_LKC)
    assert len(rounds) == 2


def test_kept_energy_never_falls_and_runs_repeat(rng):
    share_WLF = rng.gamma(0.3, size=(60, 3, 20))
    share_WLF *= 20 / share_WLF.sum(-1, keepdims=True)
    windows = make(share_WLF, rng.integers(0, 9, (60, 4)).astype(np.int32), np.arange(60) % 5)
    config = DiscoverConfig(experts=5, cap=1.25, seed=3)
    first, second = discover(config, windows, 6), discover(config, windows, 6)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert first[2] == second[2]
    kept = [figures["kept"] for figures in first[2]]
    assert len(kept) > 3 and (np.diff(kept) > -1e-3).all() and kept[-1] > kept[0] + 0.01
    assert max(figures["load_max_over_mean"] for figures in first[2]) <= 1.25
    by_hand = np.mean([share_WLF[w, i, first[0][i, e]].sum() / 20 for w, e in enumerate(first[1]) for i in range(3)])
    assert kept[-1] == pytest.approx(by_hand, rel=2e-3)
    assert not np.array_equal(first[0], discover(DiscoverConfig(experts=5, seed=4), windows, 6)[0])


def test_blocks_of_windows_add_up(rng, monkeypatch):
    windows, _, table_LKC = planted(rng)
    owner_W = np.arange(36) % 4
    whole = disc.means(windows, owner_W, 5), disc.kept_energy(windows, table_LKC)
    monkeypatch.setattr(disc, "BLOCK", 7 * 4 * 48)
    np.testing.assert_allclose(disc.means(windows, owner_W, 5), whole[0], rtol=1e-5)
    np.testing.assert_allclose(disc.kept_energy(windows, table_LKC), whole[1], rtol=1e-6)
    assert (whole[0][4] == 0).all()
    np.testing.assert_allclose(whole[0][1], windows.share_WLF[1::4].astype(np.float64).mean(0), rtol=1e-5)


@pytest.mark.parametrize("capacity", [2, 3, 4, 7])
def test_assignment_is_the_best_under_the_limit(rng, capacity):
    for _ in range(8):
        value_WE = rng.random((7, 4)) + np.array([0.4, 0, 0, 0])
        owner_W = disc.assign(value_WE, capacity)
        best = max(
            value_WE[np.arange(7), choice].sum()
            for choice in map(list, itertools.product(range(4), repeat=7))
            if np.bincount(choice).max() <= capacity
        )
        assert np.bincount(owner_W).max() <= capacity
        assert value_WE[np.arange(7), owner_W].sum() >= best - 7 * np.ptp(value_WE) / disc.STEPS
    assert np.bincount(disc.assign(np.zeros((7, 4)), capacity)).max() <= capacity, "all alike"


def test_brute_force_over_all_groupings(rng):
    """Nine windows in two experts of at most five: the best of a few starts is the best there is."""
    share_WLF = rng.gamma(0.5, size=(9, 2, 6))
    share_WLF *= 6 / share_WLF.sum(-1, keepdims=True)
    windows = make(share_WLF, np.zeros((9, 1), np.int32), np.zeros(9))
    stored_WLF = windows.share_WLF.astype(np.float64) / 6

    def kept(owner_W):
        parts = [stored_WLF[owner_W == e] for e in range(2)]
        return sum(np.sort(part.sum(0), -1)[:, -3:].sum() for part in parts) / 18

    best = max(kept(np.array(c)) for c in itertools.product(range(2), repeat=9) if 4 <= sum(c) <= 5)
    config = [DiscoverConfig(experts=2, cap=1.0, seed=seed) for seed in range(12)]
    found = max(rounds[-1]["kept"] for _, _, rounds in (discover(c, windows, 3) for c in config))
    assert found == pytest.approx(best, abs=1e-4)


def test_the_predictor_by_hand():
    """Four windows of two tokens, two experts, no window before another; smoothing and own tokens out by loops."""
    ids_WS = np.array([[5, 5], [5, 7], [7, 9], [9, -1]], np.int32)
    owner_W, vocabulary = np.array([0, 0, 1, 1]), 4  # -1 counts as an id that never comes
    windows = make(np.ones((4, 1, 2)), ids_WS, np.zeros(4))
    score_WE = np.zeros((4, 2))
    for w, e in itertools.product(range(4), range(2)):
        others = [i for v in range(4) if owner_W[v] == e and v != w for i in ids_WS[v] if i >= 0]
        for i in ids_WS[w][ids_WS[w] >= 0]:
            chance = (others.count(i) + disc.SMOOTHING) / (len(others) + disc.SMOOTHING * vocabulary)
            score_WE[w, e] += np.log(chance)
    prior_WE = np.log(1 + np.array([[1, 2], [1, 2], [2, 1], [2, 1]]))

    def expected(score_WE):
        options = []
        for power in range(8):
            odds_WE = np.exp(prior_WE + score_WE / 2**power)
            options.append(np.log(odds_WE / odds_WE.sum(1, keepdims=True)))
        return max(options, key=lambda logp: logp[np.arange(4), owner_W].sum())

    np.testing.assert_allclose(disc.predict(windows, owner_W, 2), expected(score_WE), rtol=1e-9)
    linked = Windows(**(vars(windows) | {"previous_W": np.array([-1, 0, -1, 2], np.int32)}))
    score_WE[[1, 3]] += score_WE[[0, 2]]
    np.testing.assert_allclose(disc.predict(linked, owner_W, 2), expected(score_WE), rtol=1e-9)


def test_predictability_follows_the_ids(rng):
    """Energy that hardly tells two groups apart, ids that do tell two others: the weight decides which are found."""
    windows, cluster_W, _ = planted(rng, clusters=2, each=20, channels=8)
    other_W = rng.permutation(np.repeat([0, 1], 20))
    ids_WS = (2 * rng.integers(0, 5, (40, 8)) + other_W[:, None]).astype(np.int32)
    windows = make(1 + 0.05 * windows.share_WLF.astype(np.float32), ids_WS, other_W)

    def purity(predictability, group_W):
        _, owner_W, rounds = discover(DiscoverConfig(predictability=predictability), windows, 8)
        assert ("nats" in rounds[-1]) == (predictability > 0)
        same = (owner_W == group_W).mean()
        return max(same, 1 - same)

    assert purity(0.0, cluster_W) > 0.9 and purity(0.0, other_W) < 0.8
    assert purity(0.5, other_W) > 0.95


def test_window_means_on_any_mesh(any_mesh, rng):
    share_BTF, keep_BT = rng.random((8, 12, 16), np.float32), np.ones((8, 12), np.float32)
    keep_BT[2, 7:], keep_BT[3, 4:] = 0, 0
    share_BTF *= keep_BT[..., None]
    placed = put(share_BTF, spec("batch", "seq", "mlp")), put(keep_BT, spec("batch", "seq"))
    got_BPF = np.asarray(jax.jit(window_means, static_argnums=2)(*placed, 5), np.float32)
    assert got_BPF.shape == (8, 3, 16)
    for b, p in itertools.product(range(8), range(3)):
        rows = slice(5 * p, 5 * p + 5)
        expected_F = 16 * share_BTF[b, rows].sum(0) / max(keep_BT[b, rows].sum(), 1)
        np.testing.assert_allclose(got_BPF[b, p], expected_F, rtol=1e-3)


# ---- folders ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(stages, tmp_path_factory):
    out = tmp_path_factory.mktemp("discover") / "statistics"
    argv = ["--model", str(stages.dense), "--data", str(stages.data), "--window", "5", "--batch", "3", *ONE]
    calibrate.main([*argv, "--out", str(out)])
    return out


def test_windows_are_the_statistics_in_parts(stages, windowed):
    """Weighted by tokens, the windows of a domain have its mean share; they hold its records' tokens in order."""
    stats, windows = statistics.load_statistics(windowed), statistics.load_windows(windowed)
    mlp = windows.share_WLF.shape[2]
    np.testing.assert_allclose(windows.share_WLF.astype(np.float32).sum(-1), mlp, rtol=2e-3)
    records, at = open_records(stages.data, "calibration"), 0
    for m, (name, own) in enumerate(records.items()):
        ours = windows.domain_W == m
        np.testing.assert_allclose(disc.means(windows, np.where(ours, 0, 1), 1)[0] / mlp, stats.share_MLF[m], rtol=2e-3)
        assert windows.tokens_W[ours].sum() == stats.tokens_M[m], name
        for ids_T, segments_T in zip(own.ids, own.segments):
            count = -(-np.count_nonzero(segments_T) // 5)
            mine = windows.ids_WS[at : at + count].ravel()
            np.testing.assert_array_equal(mine[mine >= 0], ids_T[segments_T > 0])
            assert windows.previous_W[at : at + count].tolist() == [-1, *range(at, at + count - 1)]
            at += count
    assert at == len(windows.ids_WS)
    plain = statistics.load_statistics(stages.statistics)
    np.testing.assert_allclose(plain.share_MLF, stats.share_MLF, rtol=1e-4)


def test_a_discovered_folder_routes_and_trains(stages, windowed, tmp_path, capsys):
    cut = ["--model", str(stages.dense), "--statistics", str(windowed), "--carving", "discovered"]
    cut += ["--importance", "energy", "--discover.predictability", "0.02"]
    carve.main([*cut, "--out", str(tmp_path / "carved"), "--discover.experts", "4"])
    shown = capsys.readouterr().out
    assert "4 expert(s) of 24 of 48 channels: expert0, expert1, expert2, expert3" in shown and "kept energy" in shown
    _, experts, _ = hf.read_config(tmp_path / "carved")
    assert experts is not None and (experts.carving, experts.experts) == ("discovered", 4)
    info = json.loads((tmp_path / "carved/manifest.json").read_text())["info"]
    windows = info["discovered"]["windows"]
    assert sorted(windows) == ["animals", "colours", "numbers"] and len(windows["animals"]) == 4
    assert np.sum(list(windows.values())) == len(statistics.load_windows(windowed).ids_WS)
    carve.main([*cut, "--out", str(tmp_path / "again"), "--discover.experts", "4"])
    assert differing(tmp_path / "carved", tmp_path / "again") == set()
    stages.alternate(tmp_path / "tuned", model=tmp_path / "carved", rounds=1, router__steps=1, experts__steps=0)
    arms = ["--arms", "routed", "oracle", "oracle_layers"]
    data = ["--data", str(stages.data), *ONE]
    evaluate.main(["--model", str(tmp_path / "tuned"), *data, "--out", str(tmp_path / "e"), *arms])
    result = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert len(result["routing"]["load"]) == 4 and all(np.isfinite(list(result["mean_loss"].values())))
    with pytest.raises(ConfigError, match="no expert is named 'animals'; experts: expert0, expert1"):
        evaluate.main(["--model", str(tmp_path / "tuned"), *data, "--out", str(tmp_path / "o"), "--arms", "own_domain"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"importance": "mean_abs"}, "importance=mean_abs must be energy"),
        ({"merge": {"a": ("b",)}}, "merge: has no meaning with carving=discovered"),
        ({"weights": {"a": 2.0}}, "weights: need carving=static or merge"),
        ({"carving": "domain", "discover": DiscoverConfig(cap=2.0)}, "discover: has no meaning"),
        ({"discover": {"cap": 0.9}}, "cap=0.9 must be at least 1"),
        ({"discover": {"experts": -1}}, "experts=-1 must not be negative"),
        ({"discover": {"rounds": 0}}, "rounds=0 must be at least 1"),
        ({"discover": {"predictability": -0.1}}, "predictability=-0.1 must be"),
        ({"discover": {"seed": -1}}, "seed=-1 must be in"),
    ],
)
def test_bad_config_is_refused(tmp_path, fields, message):
    fields = {"model": tmp_path, "statistics": tmp_path, "out": tmp_path, "importance": "energy"} | fields
    with pytest.raises(ConfigError, match=message):
        if isinstance(fields.get("discover"), dict):
            fields["discover"] = DiscoverConfig(**fields["discover"])
        carving.CarveConfig(**({"carving": "discovered"} | fields))


def test_statistics_without_windows_or_with_few(stages, windowed, tmp_path):
    def refused(error, message, folder, **fields):
        config = carving.CarveConfig(
            model=stages.dense, statistics=folder, out=tmp_path / "out", carving="discovered", importance="energy",
            discover=DiscoverConfig(**fields),
        )  # fmt: skip
        with pytest.raises(error, match=message):
            carving.carve(config)
        assert not (tmp_path / "out").exists()

    refused(ArtifactError, "windows.safetensors: no such file; calibrate with window=16", stages.statistics)
    refused(ConfigError, "experts=4000: only .* windows; calibrate on more", windowed, experts=4000)
