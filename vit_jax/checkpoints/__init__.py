"""Saving and restoring runs: `Checkpoints` writes and resumes, `restore_params` and friends only read."""

from vit_jax.checkpoints.address import STUDENTS, Address, find
from vit_jax.checkpoints.listing import Found, survey
from vit_jax.checkpoints.manager import Checkpoints, NotWritten, Restored
from vit_jax.checkpoints.reading import (
  FOLDER,
  Best,
  Damaged,
  NotSaved,
  check_place,
  latest,
  read_meta,
  restore_params,
  steps,
)
from vit_jax.checkpoints.tree import Mismatch

__all__ = [
  "Address",
  "Best",
  "Checkpoints",
  "FOLDER",
  "Found",
  "Damaged",
  "Mismatch",
  "NotSaved",
  "NotWritten",
  "Restored",
  "STUDENTS",
  "check_place",
  "find",
  "latest",
  "read_meta",
  "restore_params",
  "steps",
  "survey",
]
