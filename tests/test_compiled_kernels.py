"""What the compilers for TPU and GPU make of the kernels over pages, where they are installed: no device needed.

`pytest -m "slow or not slow" tests/test_compiled_kernels.py`, after `pip install libtpu`, of JAX's age (0.0.42 for
0.10.2), for the one, and for the other `pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt` of JAX's version.
"""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from readme_jax.models import expert_kernels, expert_pages
from readme_jax.models.expert_pages import Pages
from readme_jax.sharding import AXES, REPLICATED

# an H100's figures, as its data sheet and CUDA's occupancy tables have them
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
POOL = 1 << 30  # bytes: more than the memory on a chip
WIDTHS = [(576, 16), (960, 32), (2048, 24), (4096, 32), (8192, 64)]
pytestmark = pytest.mark.slow


def have(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(params=["tpu", "cuda"])
def target(request, monkeypatch):
    """(platform, mesh of one device that is not here)."""
    from jax.experimental import topologies

    if request.param == "tpu":
        library = importlib.util.find_spec("libtpu")
        if library is None or library.origin is None:
            pytest.skip("needs the TPU compiler: pip install libtpu")
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
        monkeypatch.setenv("TPU_LIBRARY_PATH", os.path.join(os.path.dirname(library.origin), "libtpu.so"))
        devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    else:
        if not have("jax_plugins.xla_cuda12"):
            pytest.skip("needs the GPU compiler: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt")
        found = topologies.get_topology_desc("H100", platform="cuda", target_config=H100, topology="1x1x1")
        devices = found.devices
    device = np.array(devices[:1]).reshape(1, 1, 1)
    return request.param, jax.sharding.Mesh(device, AXES, axis_types=(AxisType.Explicit,) * 3)


def compiled(target, tokens: int, d: int, page: int, dtype: str, words: int = 1):
    """`ffn` for that device, one layer's list of 64 pages, with biases where there is a second word of experts."""
    platform, mesh = target
    place = jax.NamedSharding(mesh, REPLICATED)
    rows = expert_kernels.row_major(place)

    def there(shape, dtype, where=place):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    slots = POOL // (3 * page * d * jnp.dtype(dtype).itemsize)
    bias = there((301, 2, page), dtype, rows) if words > 1 else None
    pages = Pages(there((slots, 3 * page, d), dtype, rows), there((301, words, page), jnp.uint32, rows), bias)
    ids_N, one = there((64,), jnp.int32), there((), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(expert_pages.ffn).trace(
            there((tokens, d), dtype), pages, ids_N, ids_N, one, there((tokens,), jnp.int32)
        )
        return traced.lower(lowering_platforms=(platform,)).compile()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("d, page", WIDTHS)
def test_the_kernels_compile_and_copy_no_page(target, d, page, dtype):
    for tokens, words in ((1, 2), (8, 1), (64, 1), (256, 1), (300, 2)):
        program = compiled(target, tokens, d, page, dtype, words)
        text = program.as_text()
        assert text is not None
        assert ("tpu_custom_call" if target[0] == "tpu" else "xla.gpu.triton") in text
        assert not re.search(rf"\[\d+,{3 * page},{d}\]\S* copy", text)
        memory = program.memory_analysis()
        assert memory is not None and memory.temp_size_in_bytes < POOL / 4
