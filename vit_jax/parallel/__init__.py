"""Processes, the device mesh, and the sharding rules."""

from vit_jax.parallel.lifeline import JoinError
from vit_jax.parallel.local_batch import LocalBatch
from vit_jax.parallel.mesh import (
  AXES,
  BATCH_AXES,
  MeshError,
  abstract_mesh,
  batch_sharding,
  batch_shards,
  check_batch,
  make_mesh,
  mesh_shape,
)
from vit_jax.parallel.processes import Agreement
from vit_jax.parallel.rules import ACTIVATION_AXES, check_spread, parameter_sharding, state_shardings

__all__ = [
  "ACTIVATION_AXES",
  "AXES",
  "BATCH_AXES",
  "Agreement",
  "JoinError",
  "LocalBatch",
  "MeshError",
  "abstract_mesh",
  "batch_sharding",
  "batch_shards",
  "check_batch",
  "check_spread",
  "make_mesh",
  "mesh_shape",
  "parameter_sharding",
  "state_shardings",
]
