"""Processes, the device mesh, and the sharding rules."""

from vit_jax.parallel.mesh import (
  AXES,
  BATCH_AXES,
  MeshError,
  batch_sharding,
  batch_shards,
  check_batch,
  make_mesh,
  mesh_shape,
)
from vit_jax.parallel.rules import ACTIVATION_AXES, parameter_sharding, state_shardings

__all__ = [
  "ACTIVATION_AXES",
  "AXES",
  "BATCH_AXES",
  "MeshError",
  "batch_sharding",
  "batch_shards",
  "check_batch",
  "make_mesh",
  "mesh_shape",
  "parameter_sharding",
  "state_shardings",
]
