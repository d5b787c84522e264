"""Eight forced CPU devices, warnings are errors, meshes as fixtures. Set before jax is imported."""

import ast
import gc
import os
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# `datasets` keeps what it has read of local files: not in the user's own cache
os.environ["HF_DATASETS_CACHE"] = os.path.join(tempfile.gettempdir(), "readme-jax-tests-datasets")

if sys.version_info < (3, 12, 2):
    # CPython gh-106905 (see cli.parse): a finalizer that the collector runs inside ast.parse must not parse too
    def _parse(*args, parse=ast.parse, **options):
        was = gc.isenabled()
        gc.disable()
        try:
            return parse(*args, **options)
        finally:
            if was:
                gc.enable()

    ast.parse = _parse

import jax
import pytest
from stages import stages  # noqa: F401  (a fixture for all)

from readme_jax.config import ModelConfig, RopeScaling
from readme_jax.sharding import MeshConfig, use_mesh

assert jax.device_count() == 8, "tests need 8 forced host devices; nothing is skipped for lack of them"


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    for harmless in (
        "ignore::DeprecationWarning:(?!readme_jax).*",
        "ignore::ImportWarning",
        "ignore::ResourceWarning",
        "ignore::FutureWarning:(torch|transformers|huggingface_hub).*",
        "ignore::UserWarning:(torch|transformers|orbax|datasets|multiprocess).*",
        "ignore:.*donated buffers were not usable.*",  # CPU cannot always alias a donated buffer
        "ignore:.*os.fork.*:RuntimeWarning",
        "ignore:.*SwigPy.*",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ):
        config.addinivalue_line("filterwarnings", harmless)


@pytest.fixture
def mesh():
    """One device: what most tests run on."""
    with use_mesh(MeshConfig(data=1)) as mesh:
        yield mesh


@pytest.fixture(params=[(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def any_mesh(request):
    """Every mesh shape that placement must not change results on."""
    data, expert, model = request.param
    with use_mesh(MeshConfig(data=data, expert=expert, model=model)) as mesh:
        yield mesh


@pytest.fixture
def tiny_cfg() -> ModelConfig:
    """Two layers, grouped queries, tied, head_dim unlike embed / head."""
    return ModelConfig(
        family="llama", vocab=128, embed=32, mlp=48, layer=2, head=4, kv_head=2, head_dim=16, norm_eps=1e-5,
        rope_theta=10000.0, max_position=512, tied=True,
        rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_max_position=64),
    )  # fmt: skip
