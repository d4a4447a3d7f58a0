"""Processes, the device mesh, and the sharding rules."""

from vit_jax.parallel.lifeline import JoinError
from vit_jax.parallel.local_batch import LocalBatch
from vit_jax.parallel.mesh import BATCH_AXES, MeshError, batch_sharding, batch_shards, check_batch, make_mesh
from vit_jax.parallel.processes import Agreement
from vit_jax.parallel.rules import ACTIVATION_AXES, parameter_sharding, state_shardings

__all__ = [
  "ACTIVATION_AXES",
  "BATCH_AXES",
  "Agreement",
  "JoinError",
  "LocalBatch",
  "MeshError",
  "batch_sharding",
  "batch_shards",
  "check_batch",
  "make_mesh",
  "parameter_sharding",
  "state_shardings",
]
