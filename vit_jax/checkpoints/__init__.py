"""Saving and restoring runs: `Checkpoints` writes and resumes, `restore_params` and friends only read."""

from vit_jax.checkpoints.manager import Checkpoints, Restored
from vit_jax.checkpoints.reading import Damaged, latest, read_meta, restore_params, steps
from vit_jax.checkpoints.tree import Mismatch

__all__ = ["Checkpoints", "Damaged", "Mismatch", "Restored", "latest", "read_meta", "restore_params", "steps"]
