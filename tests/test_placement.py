"""Folders into sharded arrays and back: equal to the whole on the host, each device's own bytes and no more."""

import json
import math
import os
import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import SIZES, raises, tensors, write_folder, write_moe_folder

from readme_jax import hf, placement
from readme_jax.config import CheckpointError, ConfigError
from readme_jax.models import backbone
from readme_jax.sharding import MeshConfig, P, put, use_mesh
from readme_jax.weights import SINGLE, Reader, contiguous

SIZED = SIZES | dict(vocab_size=96, hidden_size=32, intermediate_size=40)


def over_data(cfg):
    """Storage specs split over every axis: channels over `model`, width over `data`."""
    specs = {"embedding": P(None, "data"), "norm": P("data"), "layers": {}} | ({} if cfg.tied else {"head": P("data")})
    names = {"embed": "data", "mlp": "model"}
    for name, axes in backbone.block_axes(cfg).items():
        specs["layers"][name] = P(None, *(names.get(axis) for axis in axes))
    return specs


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_placed(got, want, specs):
    got, want, specs = leaves(got), leaves(want), leaves(specs)
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert isinstance(array, jax.Array) and array.dtype == want[name].dtype, name
        if name in specs:
            assert array.sharding.is_equivalent_to(jax.NamedSharding(jax.sharding.get_mesh(), specs[name]), array.ndim)
        assert np.asarray(array).tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize("dtype", [None, np.float32, ml_dtypes.bfloat16])
def test_placed_equals_loaded(tmp_path, any_mesh, dtype):
    write_moe_folder(tmp_path)
    cfg, _, _ = hf.read_config(tmp_path)
    host, host_LEC, host_router = hf.load_params(tmp_path, dtype=dtype)
    for specs in (backbone.param_specs(cfg), over_data(cfg)):
        params, experts_LEC, router = placement.load_sharded(tmp_path, specs, dtype=dtype)
        assert_placed(params, host, specs)
        assert_placed(router, host_router, {})
        assert np.array_equal(experts_LEC, host_LEC) and isinstance(experts_LEC, np.ndarray)
        assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(router))


def test_router_has_specs_of_its_own(tmp_path):
    write_moe_folder(tmp_path)
    cfg, _, router_cfg = hf.read_config(tmp_path)
    _, _, host = hf.load_params(tmp_path)
    specs = jax.tree.map(lambda a: P(*(None,) * (a.ndim - 1), "data"), host) | {"b_head": P()}
    with use_mesh(MeshConfig(data=4)):
        _, _, router = placement.load_sharded(tmp_path, backbone.param_specs(cfg), router_specs=specs)
        assert_placed(router, host, specs)


def test_experts_axis_is_a_view_of_the_rows(tmp_path):
    """Separate experts: [L, E * C, D] of the folder as [L, E, C, D], split over `expert` and `model`, and back."""
    cfg, _, _ = hf.parse_config(SIZED | dict(model_type="llama", intermediate_size=48, mlp_bias=True))
    host, folder = write_folder(tmp_path / "in", cfg, 20_000), tmp_path / "in"
    E, C = 4, 12
    specs, shapes, split = backbone.param_specs(cfg), backbone.abstract_params(cfg), {}
    for name in ("w_gate", "w_up", "w_down", "b_gate", "b_up"):
        split[name] = host["layers"][name].reshape(cfg.layer, E, C, *host["layers"][name].shape[2:])
        specs["layers"][name] = P(None, "expert", "model", *(None,) * (split[name].ndim - 3))
        shapes["layers"][name] = jax.ShapeDtypeStruct(split[name].shape, np.float32)
    with use_mesh(MeshConfig(data=1, expert=2, model=2)):
        params, _, _ = placement.load_sharded(folder, specs, shapes=shapes)
        assert_placed(params, host | {"layers": host["layers"] | split}, specs)
        placement.save_sharded(tmp_path / "out", cfg, params, max_shard_bytes=20_000)
    assert files(tmp_path / "out") == {k: v for k, v in files(folder).items() if k != "config.json"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_written_as_from_the_host(tmp_path, any_mesh):
    """Byte for byte, names of the files included, from any mesh."""
    write_moe_folder(tmp_path / "in")
    cfg, _, _ = hf.read_config(tmp_path / "in")
    params, experts_LEC, router = hf.load_params(tmp_path / "in")
    with hf.Writer(tmp_path / "host", 9_000) as writer:
        hf.save_params(writer, cfg, params, experts_LEC, router)
    for name, specs in (("plain", backbone.param_specs(cfg)), ("over_data", over_data(cfg))):
        placed = jax.tree.map(put, params, specs), experts_LEC, jax.tree.map(jax.numpy.asarray, router)
        placement.save_sharded(tmp_path / name, cfg, *placed, max_shard_bytes=9_000)
        assert files(tmp_path / name) == files(tmp_path / "host") and len(files(tmp_path / name)) > 5


# ---- bytes read -------------------------------------------------------------------------------


class Counting(np.ndarray):
    """A view that notes the size of every part taken of it (of weights: `check` looks through the table of experts)."""

    taken: list[tuple[tuple, int]] = []

    def __getitem__(self, index):
        part = super().__getitem__(index)
        if self.dtype != np.int32:
            Counting.taken.append((index, part.nbytes))
        return np.asarray(part)


class CountingReader(Reader):
    def get(self, name):
        return super().get(name).view(Counting)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_a_device_reads_its_own_part(tmp_path, monkeypatch, shape):
    """Every byte of the folder once, whatever the mesh: a part that several devices hold is read once for all."""
    cfg, _, _ = hf.parse_config(SIZED | dict(model_type="llama"))
    host = write_folder(tmp_path, cfg, 20_000)
    total = sum(array.nbytes for array in jax.tree.leaves(host))
    monkeypatch.setattr(placement, "Reader", CountingReader)
    monkeypatch.setattr(Counting, "taken", [])
    with use_mesh(MeshConfig(data=shape[0], expert=shape[1], model=shape[2])):
        specs = over_data(cfg)
        params, _, _ = placement.load_sharded(tmp_path, specs)
        assert sum(size for _, size in Counting.taken) == total
        kinds = {name: len(array.sharding.devices_indices_map(array.shape)) for name, array in leaves(params).items()}
        assert all(count == math.prod(shape) for count in kinds.values())
        by_device = {d: 0 for d in jax.sharding.get_mesh().devices.flat}
        for array in jax.tree.leaves(params):
            for shard in array.addressable_shards:
                by_device[shard.device] += shard.data.nbytes
    own = max(by_device.values())
    split = shape[0] * shape[2]
    assert own <= total / shape[0] and (split == 1 or own < 0.95 * total)
    # What was read for a device is what it holds, nothing around it.
    largest = max(size for _, size in Counting.taken)
    assert largest <= max(
        array.nbytes // (cfg.layer if "layers" in name else 1) for name, array in leaves(host).items()
    )


SHAPE_70B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def write_sparse(folder: Path, config: dict, shards: int) -> int:
    """A folder of `config` in bf16 whose files are holes behind valid headers: no disk. Returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    cfg, _, _ = hf.read_config(folder)
    names = [(name, entry.hf_shape) for entry in hf.table(cfg) for name in entry.names()]
    weight_map, total = {}, 0
    for number in range(shards):
        own, header, start = names[number::shards], {}, 0
        for name, shape in own:
            end = start + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        path = folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + start)
        weight_map |= {name: path.name for name, _ in own}
        total += start
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def resident() -> dict[str, int]:
    """Bytes of this process in memory now: its own and those of mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_part_of_a_70b_checkpoint(tmp_path):
    """What one device of a 16 x 8 pod reads of the largest tensors: memory stays at the part, pages at its own."""
    total = write_sparse(tmp_path, SHAPE_70B, 30)
    assert total > 140e9 and sum(p.stat().st_blocks * 512 for p in tmp_path.iterdir()) < 2e6
    cfg, _, _ = hf.read_config(tmp_path)
    reader = Reader(tmp_path)
    hf.check(reader, cfg)  # headers only
    before, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entries = {entry.path[-1]: entry for entry in hf.table(cfg)}
    data, model = slice(512, 1024), slice(3584, 7168)
    parts = {"w_gate": (model, data), "w_up": (model, data), "w_down": (model, data), "embedding": (slice(None), data)}
    for name, index in parts.items():
        entry = entries[name]
        read = placement.part_reader(reader, entry, entry.hf.format(layer=79), entry.shape, np.dtype(np.float32))
        part = read(index)
        assert part.flags.c_contiguous and part.shape == tuple(len(range(n)[s]) for n, s in zip(entry.shape, index))
        grown = resident()["RssAnon"] - before["RssAnon"]
        assert grown < part.nbytes + (8 << 20), f"{name}: {grown} beside a part of {part.nbytes}"
        del part, read
    # The embedding's part has a page in every row, so its whole bf16 map (2.1 GB) may have been touched, not kept.
    assert resident()["RssFile"] - before["RssFile"] < 64 << 20
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert grown < 2 * 128256 * 8192 + 4 * 128256 * 512 + (64 << 20)


# ---- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64, np.bool_])
@pytest.mark.parametrize("target", [None, np.float32])
def test_contiguous_is_a_copy(dtype, target):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (300, 6, 270)).astype(dtype)
    for view in (
        base,
        base.T,
        base[:, 0],
        base[:, 0].T,
        base[3, 2],
        base[::2, 1, 5:].T,
        base[:, 0].T.reshape(27, 10, 300),
    ):
        got = contiguous(view, target)
        assert got.dtype == (dtype if target is None else target) and got.flags.c_contiguous
        assert not np.shares_memory(got, base) and np.array_equal(got, view.astype(got.dtype))


# ---- several processes ------------------------------------------------------------------------


TWO = """
import json, sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
import test_placement as t
from readme_jax import hf, placement
from readme_jax.sharding import MeshConfig, use_mesh
cfg, _, _ = hf.read_config(sys.argv[3])
placement.Reader = t.CountingReader
placement.GATHER = 3000
with use_mesh(MeshConfig(data=4, model=2)):
    params, table, router = placement.load_sharded(sys.argv[3], t.over_data(cfg))
    assert not params["embedding"].is_fully_addressable and router["norm"].is_fully_replicated
    read = sum(size for _, size in t.Counting.taken)
    placement.save_sharded(sys.argv[4], cfg, params, table, router, max_shard_bytes=9000)
    print(json.dumps({"read": read}))
"""


def two_processes(program: str, *arguments: str) -> list[str]:
    """Run a program as two processes of 4 devices each on loopback; their standard outputs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    env = os.environ | flags | {"PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", program, str(port)]
    runs = [
        subprocess.Popen([*command, str(i), *arguments], env=env, text=True, stdout=-1, stderr=-1) for i in range(2)
    ]
    answers = [run.communicate(timeout=120) for run in runs]
    for run, (_, errors) in zip(runs, answers):
        assert run.returncode == 0, errors[-3000:]
    return [out for out, _ in answers]


def test_two_processes_read_their_halves_and_write_one_folder(tmp_path):
    write_moe_folder(tmp_path / "in")
    cfg, _, _ = hf.read_config(tmp_path / "in")
    host = hf.load_params(tmp_path / "in")
    with hf.Writer(tmp_path / "host", 9000) as writer:
        hf.save_params(writer, cfg, *host)
    answers = two_processes(TWO, str(tmp_path / "in"), str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(tmp_path / "host")
    # data=4 over two processes: each holds half of what is split over `data`, and all of the rest.
    specs, arrays = leaves(over_data(cfg)), leaves(host[0])
    own = sum(array.nbytes // (2 if "data" in specs[name] else 1) for name, array in arrays.items())
    own += sum(array.nbytes for array in jax.tree.leaves(host[2]))
    assert [json.loads(answer.splitlines()[-1])["read"] for answer in answers] == [own, own]
    assert own < 0.8 * sum(array.nbytes for array in jax.tree.leaves((host[0], host[2])))


# ---- refusals ---------------------------------------------------------------------------------


def test_refusals(tmp_path):
    cfg, _, _ = hf.parse_config(SIZED | dict(model_type="llama"))
    host = write_folder(tmp_path / "in", cfg)
    with use_mesh(MeshConfig(data=1, model=3)):
        with raises(ConfigError, "mlp=40 FFN channels must be a multiple of mesh.model=3"):
            placement.load_sharded(tmp_path / "in", backbone.param_specs(cfg))
    with use_mesh(MeshConfig(data=2)):
        split = backbone.param_specs(cfg)
        split["layers"]["w_q"] = P("data")
        with raises(ConfigError, "layers.w_q", "layer axis"):
            placement.load_sharded(tmp_path / "in", split)
        shapes = backbone.abstract_params(cfg)
        shapes["layers"]["w_up"] = jax.ShapeDtypeStruct((cfg.layer, 3, 13, 32), np.float32)
        with raises(CheckpointError, "mlp.up_proj.weight", "(40, 32)", "(3, 13, 32)"):
            placement.load_sharded(tmp_path / "in", backbone.param_specs(cfg), shapes=shapes)
        (tmp_path / "in" / SINGLE).write_bytes((tmp_path / "in" / SINGLE).read_bytes()[:-4])
        with raises(CheckpointError, SINGLE, "truncated"):
            placement.load_sharded(tmp_path / "in", backbone.param_specs(cfg))
        out = tmp_path / "out"
        for change, words in (
            ({"norm": host["norm"][1:]}, ["norm", "(31,)", "(32,)"]),
            ({"extra": host["norm"]}, ["extra", "not part"]),
            ({"layers": host["layers"] | {"w_q": host["layers"]["w_q"][:, :2]}}, ["layers.w_q", "(2, 16, 32)"]),
        ):
            with raises(CheckpointError, *words):
                placement.save_sharded(out, cfg, host | change)
            assert not list(out.iterdir()), "nothing half written"
    assert tensors(tmp_path / "out") == {}
