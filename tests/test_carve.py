"""Carving against METHOD.md section 2 written as plain loops, and carved folders against the dense model."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax import artifacts, carve, cli, hf, statistics
from readme_jax.config import ArtifactError, CheckpointError, ConfigError, DataError, RouterConfig


def masks_by_loops(importance_MLF, channels):
    """METHOD section 2: per domain and layer the top channels, one at a time, ties to the lower index."""
    table = []
    for layer in range(importance_MLF.shape[1]):
        row = []
        for domain in range(importance_MLF.shape[0]):
            left = list(range(importance_MLF.shape[2]))
            chosen = []
            for _ in range(channels):
                best = left[0]
                for j in left:
                    if importance_MLF[domain, layer, j] > importance_MLF[domain, layer, best]:
                        best = j
                chosen.append(best)
                left.remove(best)
            row.append(sorted(chosen))
        table.append(row)
    return np.array(table)


def make_statistics(rng, names=("code", "wiki", "news"), layers=2, mlp=24, tokens=(100, 300, 50)):
    shape = (len(names), layers, mlp)
    mean_MLF = rng.normal(size=shape).astype(np.float32)
    abs_MLF = np.abs(mean_MLF) + rng.random(shape, np.float32)
    share_MLF = rng.random(shape, np.float32)
    return statistics.Statistics(
        names=tuple(names),
        abs_MLF=abs_MLF,
        square_MLF=abs_MLF**2 + 0.1,
        mean_MLF=mean_MLF,
        share_MLF=share_MLF / share_MLF.sum(-1, keepdims=True),
        tokens_M=np.array(tokens, np.int64),
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean_abs", "mean_abs_norm", "energy"])
@pytest.mark.parametrize("channels", [1, 12, 24])
def test_domain_experts_are_the_masks_of_the_method(rng, kind, channels):
    stats = make_statistics(rng)
    norm_LF = rng.random((2, 24), np.float32)
    got = carve.choose(statistics.importance(stats, kind, norm_LF), channels)
    expected_MLF = np.empty((3, 2, 24), np.float32)
    for m, layer, j in np.ndindex(3, 2, 24):
        expected_MLF[m, layer, j] = {
            "mean_abs": stats.abs_MLF[m, layer, j],
            "mean_abs_norm": stats.abs_MLF[m, layer, j] * norm_LF[layer, j],
            "energy": stats.share_MLF[m, layer, j],
        }[kind]
    np.testing.assert_array_equal(got, masks_by_loops(expected_MLF, channels))
    assert got.dtype == np.int32 and got.shape == (2, 3, channels)


def test_ties_go_to_the_lower_channel(rng):
    importance_MLF = rng.integers(0, 3, size=(4, 3, 40)).astype(np.float32)
    np.testing.assert_array_equal(carve.choose(importance_MLF, 20), masks_by_loops(importance_MLF, 20))
    assert carve.choose(np.zeros((1, 1, 6), np.float32), 3).tolist() == [[[0, 1, 2]]]


def test_static_is_one_mask_of_the_weighted_mean(rng):
    importance_MLF = rng.random((3, 2, 24), np.float32)
    weights_M = [1.0, 0.0, 3.0]
    mean_LF = np.zeros((2, 24))
    for layer, j in np.ndindex(2, 24):
        mean_LF[layer, j] = sum(w * float(importance_MLF[m, layer, j]) for m, w in enumerate(weights_M)) / 4.0
    got = carve.choose(importance_MLF, 12, "static", np.array(weights_M))
    np.testing.assert_array_equal(got, masks_by_loops(mean_LF[None], 12))
    equal = carve.choose(importance_MLF, 12, "static")
    np.testing.assert_array_equal(equal, masks_by_loops(importance_MLF.astype(np.float64).mean(0)[None], 12))


def test_channels_of_fraction():
    assert carve.channels_of(0.5, 1536) == 768
    assert carve.channels_of(1.0, 7) == 7
    assert carve.channels_of(0.3, 10) == 3
    for fraction in (0.01, -0.5, 1.2, float("nan")):
        with pytest.raises(ConfigError, match=f"fraction={fraction} of 24 channels"):
            carve.channels_of(fraction, 24)


def test_merged_is_the_weighted_mean(rng):
    stats = make_statistics(rng)
    got = statistics.merged(stats, {"text": ("wiki", "news"), "all": ("code", "wiki", "news")}, {"wiki": 3.0})
    assert got.names == ("text", "all") and got.tokens_M.tolist() == [350, 450]
    for name, array_MLF in stats.arrays().items():
        expected = [(3 * array_MLF[1] + array_MLF[2]) / 4, (array_MLF[0] + 3 * array_MLF[1] + array_MLF[2]) / 5]
        np.testing.assert_allclose(got.arrays()[name], expected, rtol=1e-5, atol=1e-7)


def test_bad_merge_is_named(rng):
    stats = make_statistics(rng)
    with pytest.raises(ConfigError, match=r"merge\.text: no domain 'poems' in the statistics; known: code, wiki, news"):
        statistics.merged(stats, {"text": ("poems",)}, {})
    with pytest.raises(ConfigError, match=r"weights\.poems: no domain 'poems'"):
        statistics.merged(stats, {"text": ("code",)}, {"poems": 1.0})
    with pytest.raises(ConfigError, match="every domain of expert text has weight 0"):
        statistics.merged(stats, {"text": ("code",)}, {"code": 0.0})
    empty = dataclasses.replace(stats, tokens_M=np.array([5, 0, 5]))
    with pytest.raises(DataError, match="domain wiki: 0 calibration tokens"):
        statistics.merged(empty, {"all": ("code", "wiki")}, {})


# ---- permutation ------------------------------------------------------------------------------


@st.composite
def tables(draw):
    mlp = draw(st.integers(1, 30))
    channels, experts = draw(st.integers(1, mlp)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.permutation(mlp)[:channels]) for _ in range(experts)]).astype(np.int32), mlp


@settings(max_examples=200, deadline=None)
@given(tables())
def test_permutation_round_trip(table):
    experts_EC, mlp = table
    order_F = carve.permutation(experts_EC, mlp)
    bank_F = np.arange(mlp) * 7
    np.testing.assert_array_equal(bank_F[order_F][carve.inverse(order_F)], bank_F)
    moved_EC = carve.relabel(experts_EC, order_F)
    assert moved_EC.dtype == np.int32 and (np.diff(moved_EC, axis=-1) > 0).all()
    for old_C, new_C in zip(experts_EC, moved_EC):  # the same channels under new ids
        assert set(order_F[new_C]) == set(old_C)

    member_EF = carve.membership(moved_EC, mlp)
    count_F = member_EF.sum(0)
    assert (np.diff(count_F) <= 0).all()  # in most experts first, unused last
    patterns = [tuple(column) for column in member_EF.T]
    runs = [p for i, p in enumerate(patterns) if i == 0 or p != patterns[i - 1]]
    assert len(runs) == len(set(runs))  # equal membership lies together
    for i in range(1, mlp):  # stable: inside a group the old order
        assert patterns[i] != patterns[i - 1] or order_F[i] > order_F[i - 1]
    np.testing.assert_array_equal(carve.permutation(moved_EC, mlp), np.arange(mlp))  # sorted already: identity


def test_inverse_refuses_what_is_no_permutation():
    with pytest.raises(ArtifactError, match="not a permutation of 3 channels"):
        carve.inverse(np.array([0, 2, 2]))


def test_membership_and_overlap_of_a_small_table():
    experts_LEC = np.array([[[0, 1], [1, 2]], [[0, 1], [0, 1]]], np.int32)
    member_LEF = carve.membership(experts_LEC, 4)
    assert member_LEF.astype(int).tolist() == [[[1, 1, 0, 0], [0, 1, 1, 0]], [[1, 1, 0, 0], [1, 1, 0, 0]]]
    got = carve.overlap_statistics(experts_LEC, 4)
    assert got["shared_share"] == pytest.approx((1 / 2 + 2 / 2) / 2)
    assert got["union_share"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert got["pairwise_overlap"] == pytest.approx(0.75)
    np.testing.assert_allclose(got["overlap"], [[1, 0.75], [0.75, 1]])
    assert carve.overlap_statistics(experts_LEC[:, :1], 4)["pairwise_overlap"] == 1.0


# ---- statistics file --------------------------------------------------------------------------


def test_statistics_round_trip(rng, tmp_path):
    stats = make_statistics(rng)
    statistics.save_statistics(stats, tmp_path)
    back = statistics.load_statistics(tmp_path)
    assert back.names == stats.names and back.tokens_M.dtype == np.int64
    for name, value in [*stats.arrays().items(), ("tokens_M", stats.tokens_M)]:
        np.testing.assert_array_equal(getattr(back, name), value)
        assert getattr(back, name).dtype == value.dtype


def test_bad_statistics_are_refused(rng, tmp_path):
    with pytest.raises(ArtifactError, match="no such file; run calibrate first"):
        statistics.load_statistics(tmp_path)
    stats = make_statistics(rng)
    for change, message in [
        ({"names": ("code", "wiki")}, "abs_MLF is"),
        ({"names": ("code", "wiki", "wiki")}, "not distinct"),
        ({"mean_MLF": stats.mean_MLF[:, :1]}, "mean_MLF is"),
        ({"share_MLF": stats.share_MLF * np.nan}, "share_MLF holds values that are not finite"),
    ]:
        statistics.save_statistics(dataclasses.replace(stats, **change), tmp_path)
        with pytest.raises(ArtifactError, match=message):
            statistics.load_statistics(tmp_path)
    path = tmp_path / statistics.STATISTICS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="not readable as statistics"):
        statistics.load_statistics(tmp_path)


def test_carving_needs_no_jax():
    code = "import sys, readme_jax.carve; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- folders ----------------------------------------------------------------------------------

NAMES = ("code", "wiki", "news")


def make_model(folder, cfg, dtype=np.float32, router=None, experts=None, table=None):
    """A finished model folder with random weights and one tokenizer file."""
    with artifacts.building(folder, "import", {"made": "for a test"}, {}) as work:
        with hf.Writer(work.path) as writer:
            hf.save_params(writer, cfg, hf.init_params(cfg, 1, dtype), table, router)
        config = None if router is None else RouterConfig(width=16, heads=2)
        data = hf.config_to_hf(cfg, {}, experts, config)
        (work.path / "config.json").write_text(json.dumps(data))
        (work.path / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def make_run(tiny_cfg, tmp_path, rng):
    """make_run(**CarveConfig fields) -> config, over a dense model with FFN biases and its statistics."""
    cfg = dataclasses.replace(tiny_cfg, mlp_bias=True, tied=False)
    make_model(tmp_path / "dense", cfg)
    stats = make_statistics(rng, NAMES, cfg.layer, cfg.mlp)
    with artifacts.building(tmp_path / "statistics", "calibrate", {}, {}) as work:
        statistics.save_statistics(stats, work.path)

    def make(out="carved", **fields):
        fields = {"model": tmp_path / "dense", "statistics": tmp_path / "statistics"} | fields
        return carve.CarveConfig(out=tmp_path / out, **fields)

    make.stats, make.cfg = stats, cfg
    return make


def tensors(folder):
    reader = hf.Reader(folder)
    return {name: reader.get(name) for name in reader.names()}


def ffn_by_loops(x_D, layer, ids):
    """One token through the given channels, float64."""
    y_D = np.zeros(len(x_D))
    for j in ids:
        gate = layer["w_gate"][j].astype(np.float64) @ x_D + layer["b_gate"][j]
        up = layer["w_up"][j].astype(np.float64) @ x_D + layer["b_up"][j]
        y_D += gate / (1 + np.exp(-gate)) * up * layer["w_down"][j]
    return y_D


@pytest.mark.parametrize("kind", ["mean_abs", "mean_abs_norm", "energy"])
def test_carved_folder_is_the_dense_model_with_its_channels_moved(make_run, kind):
    config, cfg, stats = make_run(importance=kind, fraction=0.25), make_run.cfg, make_run.stats
    info = carve.carve(config)
    dense, no_table, _ = hf.load_params(config.model)
    carved, table_LEC, router = hf.load_params(config.out)
    assert no_table is None and router is None
    layers, moved = dense["layers"], carved["layers"]
    for name in set(layers) - set(carve.BANK):
        np.testing.assert_array_equal(moved[name], layers[name])
    for name in ("embedding", "norm", "head"):
        np.testing.assert_array_equal(carved[name], dense[name])

    norm_LF = np.sqrt((layers["w_down"].astype(np.float64) ** 2).sum(-1))
    values = {"mean_abs": stats.abs_MLF, "mean_abs_norm": stats.abs_MLF * norm_LF, "energy": stats.share_MLF}[kind]
    masks_LEC = masks_by_loops(values, 12)
    x_D = np.random.default_rng(3).normal(size=cfg.embed)
    for i in range(cfg.layer):
        old, new = ({name: array[i] for name, array in tree.items()} for tree in (layers, moved))
        rows = {bytes(row): j for j, row in enumerate(old["w_gate"])}
        order_F = [rows[bytes(row)] for row in new["w_gate"]]
        assert sorted(order_F) == list(range(cfg.mlp))
        for name in carve.BANK:
            np.testing.assert_array_equal(new[name], old[name][order_F])
        for e in range(3):
            assert sorted(order_F[j] for j in table_LEC[i, e]) == masks_LEC[i, e].tolist()
            got, expected = ffn_by_loops(x_D, new, table_LEC[i, e]), ffn_by_loops(x_D, old, masks_LEC[i, e])
            np.testing.assert_allclose(got, expected, rtol=1e-9)
        everything = range(cfg.mlp)
        np.testing.assert_allclose(ffn_by_loops(x_D, new, everything), ffn_by_loops(x_D, old, everything), rtol=1e-9)

    new_cfg, experts, _ = hf.read_config(config.out)
    assert new_cfg == cfg and experts is not None
    assert (experts.names, experts.channels, experts.storage, experts.importance) == (NAMES, 12, "tied", kind)
    assert (config.out / "tokenizer.json").read_text() == "{}"
    assert artifacts.verify(config.out, hashes=True)["info"] == info
    assert info["error"] < 1e-5
    expected = carve.overlap_statistics(masks_LEC, cfg.mlp)
    assert {key: info[key] for key in expected} == expected


def test_static_and_merged_experts(make_run):
    stats = make_run.stats
    weights = {"wiki": 2.0}
    static = make_run("static", carving="static", weights=weights)
    carve.carve(static)
    rows = {bytes(row): j for j, row in enumerate(hf.load_params(static.model)[0]["layers"]["w_up"][0])}

    def chosen(folder):
        params, table_LEC, _ = hf.load_params(folder)
        return [sorted(rows[bytes(params["layers"]["w_up"][0, j])] for j in ids) for ids in table_LEC[0]]

    mean_LF = (stats.abs_MLF[0] + 2.0 * stats.abs_MLF[1].astype(np.float64) + stats.abs_MLF[2]) / 4
    assert chosen(static.out) == masks_by_loops(mean_LF[None], 24)[0].tolist()
    assert hf.read_config(static.out)[1].names == ("static",)

    merge = make_run("merge", merge={"code": ("code",), "text": ("wiki", "news")}, weights=weights)
    carve.carve(merge)
    text_LF = (2.0 * stats.abs_MLF[1].astype(np.float64) + stats.abs_MLF[2]) / 3
    expected = masks_by_loops(np.stack([stats.abs_MLF[0].astype(np.float64), text_LF]), 24)[0].tolist()
    assert chosen(merge.out) == expected
    assert hf.read_config(merge.out)[1].names == ("code", "text")


def test_separate_storage_is_the_tied_one_gathered(make_run, tmp_path):
    tied, separate = make_run("tied"), make_run("separate", storage="separate")
    carve.carve(tied)
    info = carve.carve(separate)
    carve.to_separate(tied.out, tmp_path / "converted")
    a, b = tensors(separate.out), tensors(tmp_path / "converted")
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes()
    cfg, experts, _ = hf.read_config(separate.out)
    assert (cfg.mlp, experts.storage, experts.channels) == (72, "separate", 24) and info["mlp"] == 48
    old, table_LEC, _ = hf.load_params(tied.out)
    new, own_LEC, _ = hf.load_params(separate.out)
    for i, e in np.ndindex(2, 3):
        assert own_LEC[i, e].tolist() == list(range(e * 24, e * 24 + 24))
        for name in carve.BANK:
            np.testing.assert_array_equal(
                new["layers"][name][i, own_LEC[i, e]], old["layers"][name][i, table_LEC[i, e]]
            )
    with pytest.raises(ConfigError, match="storage=separate already"):
        carve.to_separate(separate.out, tmp_path / "again")
    with pytest.raises(ConfigError, match="is dense, there are no experts"):
        carve.to_separate(tied.model, tmp_path / "again")


def test_to_separate_keeps_the_router(make_run, tmp_path):
    tied = make_run("tied")
    carve.carve(tied)
    experts, table_LEC = hf.read_config(tied.out)[1], hf.load_params(tied.out)[1]
    rng = np.random.default_rng(5)
    shapes = {"attn_norm": (1, 16), "mlp_norm": (1, 16)}
    for name in ("q", "k", "v", "o", "in", "out"):
        shapes |= {f"w_{name}": (1, 16, 16), f"b_{name}": (1, 16)}
    router = {"embedding": (make_run.cfg.vocab, 16), "norm": (16,), "head": (3, 16), "b_head": (3,)}
    router = {name: rng.random(shape, np.float32) for name, shape in router.items()}
    router["layers"] = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    make_model(tmp_path / "routed", make_run.cfg, router=router, experts=experts, table=table_LEC)
    carve.to_separate(tmp_path / "routed", tmp_path / "separate")
    a, b = tensors(tmp_path / "routed"), tensors(tmp_path / "separate")
    names = [name for name in a if name.startswith("readme.router.")]
    assert len(names) == 4 + 14
    assert all(a[name].tobytes() == b[name].tobytes() for name in names)
    assert hf.read_config(tmp_path / "separate")[2] == RouterConfig(width=16, heads=2)


def test_bfloat16_stays_bfloat16(tiny_cfg, tmp_path, make_run):
    import ml_dtypes

    model = make_model(tmp_path / "half", tiny_cfg, ml_dtypes.bfloat16)
    config = make_run("out", model=model)
    carve.carve(config)
    before, after = tensors(model), tensors(config.out)
    assert {after[name].dtype for name in before} == {np.dtype(ml_dtypes.bfloat16)}
    name = "model.layers.1.mlp.down_proj.weight"
    columns = [sorted(column.tobytes() for column in folder[name].T) for folder in (before, after)]
    assert columns[0] == columns[1]


def test_a_finished_folder_is_kept_and_never_overwritten(make_run):
    config = make_run()
    info = carve.carve(config)
    stamp = (config.out / "model.safetensors").stat().st_mtime_ns
    assert carve.carve(config) == info
    assert (config.out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ArtifactError, match="belongs to another run.*fraction=0.5 there, 0.25 here"):
        carve.carve(dataclasses.replace(config, fraction=0.25))


def test_bad_input_is_one_line_and_leaves_nothing(make_run, tmp_path, rng):
    def folder(stats, name):
        with artifacts.building(tmp_path / name, "calibrate", {}, {}) as work:
            statistics.save_statistics(stats, work.path)
        return tmp_path / name

    stats = make_run.stats
    other = folder(make_statistics(rng, NAMES, 3, 48), "layers")
    wide = folder(make_statistics(rng, NAMES, 2, 64), "wide")
    empty = folder(dataclasses.replace(stats, tokens_M=np.array([4, 0, 4])), "empty")
    carve.carve(make_run("carved"))
    before = sorted(tmp_path.iterdir())
    for error, message, fields in [
        (ConfigError, "fraction=0.01 of 48 channels gives 0 channels", {"fraction": 0.01}),
        (ConfigError, "statistics=.*3 layers of 48 channels, model=.* has 2 of 48", {"statistics": other}),
        (ConfigError, "statistics=.*2 layers of 64 channels, model=.* has 2 of 48", {"statistics": wide}),
        (DataError, "domain wiki: 0 calibration tokens, at least 1 needed", {"statistics": empty}),
        (ConfigError, r"merge\.text: no domain 'poems'.*known: code, wiki, news", {"merge": {"text": ("poems",)}}),
        (ConfigError, "is carved already", {"model": tmp_path / "carved"}),
        (ArtifactError, "no such file; run calibrate first", {"statistics": tmp_path / "dense"}),
        (CheckpointError, "config.json: no such file", {"model": tmp_path / "nowhere"}),
    ]:
        with pytest.raises(error, match=message) as caught:
            carve.carve(make_run("out", **fields))
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fraction": 0.0}, "fraction=0.0 must be above 0 and at most 1"),
        ({"fraction": float("nan")}, "fraction=nan must be above 0"),
        ({"merge": {"a": ()}}, r"merge\.a: names no domain"),
        ({"merge": {"a": ("x", "x")}}, r"merge\.a: names a domain twice: x, x"),
        ({"merge": {"a": ("x",)}, "carving": "static"}, "merge: has no meaning with carving=static"),
        ({"weights": {"a": 2.0}}, "weights: need carving=static or merge"),
        ({"weights": {"a": -1.0}, "carving": "static"}, r"weights\.a=-1.0 must be finite and at least 0"),
    ],
)
def test_bad_config_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        carve.CarveConfig(model=Path("m"), statistics=Path("s"), out=Path("o"), **fields)


def test_self_check_catches_a_wrong_bank(tiny_cfg):
    params = hf.init_params(tiny_cfg, 2)["layers"]
    dense = {name: params[name][0] for name in ("w_gate", "w_up", "w_down")}
    experts_EC = np.stack([np.arange(24), np.arange(12, 36)]).astype(np.int32)
    order_F = carve.permutation(experts_EC, 48)
    stored, moved_EC = {name: array[order_F] for name, array in dense.items()}, carve.relabel(experts_EC, order_F)
    assert carve.check_layer("layer 0", dense, stored, experts_EC, moved_EC) < 1e-5
    forgotten = stored | {"w_down": dense["w_down"]}
    lost = stored | {"w_up": stored["w_up"].copy()}
    lost["w_up"][47] = 0.0  # a channel of no expert: only the run with all channels on can see it
    broken = stored | {"w_gate": stored["w_gate"] * np.nan}
    for bank, table_EC, message in [
        (forgotten, moved_EC, "layer 0: the carved FFN differs"),
        (lost, moved_EC, "layer 0: the carved FFN differs"),
        (broken, moved_EC, "layer 0: the carved FFN differs"),
        (stored, experts_EC[::-1], "layer 0: the carved FFN differs"),
        (stored, np.zeros_like(moved_EC), "has not exactly 24 distinct channels"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            carve.check_layer("layer 0", dense, bank, experts_EC, table_EC)


def test_program(make_run, capsys):
    from readme_jax.train import carve as program

    config = make_run("by-program")
    argv = ["--model", str(config.model), "--statistics", str(config.statistics), "--out", str(config.out)]
    for _ in range(2):  # the second run finds the result
        program.main(argv)
        out = capsys.readouterr().out
        assert "3 expert(s) of 24 of 48 channels: code, wiki, news" in out and "mean pairwise overlap" in out
    with pytest.raises(SystemExit) as stop:
        cli.run(program.main, [*argv, "--fraction", "0.25"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: out={config.out} belongs to another run")
