"""Training checkpoints. The only file that knows Orbax (v1).

A checkpoint is `{name: pure tree}` at an integer step. Orbax writes beside the final name and renames, so a kill
leaves the previous checkpoint the latest.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from readme_jax.config import CheckpointError


class Checkpoints:
    """Checkpoints of one run below `root`; the newest `keep` are kept."""

    def __init__(self, root: Path, keep: int = 1):
        training = ocp.training
        self._inner = training.Checkpointer(
            Path(root).absolute(),
            preservation_policy=training.preservation_policies.LatestN(keep),
        )

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, None when there is none."""
        found = self._inner.latest
        return None if found is None else found.step

    def save(self, step: int, trees: dict[str, Any]) -> None:
        """Write a checkpoint and wait for it: the caller goes on to donate these buffers."""
        self._inner.save_checkpointables(step, trees, force=True, overwrite=True)

    def restore(self, like: dict[str, Any]) -> dict[str, Any]:
        """Read the newest checkpoint with the shapes, dtypes and shardings of `like` (arrays already placed)."""

        def abstract(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        try:
            return self._inner.load_checkpointables(None, jax.tree.map(abstract, like))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(f"checkpoint {self.latest()}: {' '.join(str(error).split())[:300]}") from None

    def close(self) -> None:
        """Finish and release."""
        self._inner.close()
