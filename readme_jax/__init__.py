"""readme-jax: a dense pre-trained LLM becomes a Read-ME mixture of experts in JAX, and goes back to PyTorch.

`readme_jax.load(path_or_name)` opens any dense or carved model (see `readme_jax.api.Model`);
`readme_jax.Engine(path_or_name, expert_memory="0.5x")` serves a carved one. Nothing heavy is imported until it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from readme_jax.api import Model, load
    from readme_jax.config import ReadMeError
    from readme_jax.generation import Sampling
    from readme_jax.serving.engine import Engine
    from readme_jax.serving.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "Model", "ReadMeError", "Sampling", "SamplingParams", "load"]

_WHERE = {
    "Engine": "serving.engine",
    "Model": "api",
    "load": "api",
    "ReadMeError": "config",
    "Sampling": "generation",
    "SamplingParams": "serving.request",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"readme_jax.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'readme_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
