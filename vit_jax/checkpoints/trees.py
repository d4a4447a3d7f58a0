"""A bare parameter tree on disk, without a run around it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from vit_jax.checkpoints import tree
from vit_jax.checkpoints.quiet import quiet_orbax


def write_tree(path: str | os.PathLike, params: Mapping[str, Any]) -> None:
  """Writes a tree of arrays (nested dicts) to a new folder."""
  quiet_orbax()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    arrays = tree.nest(tree.leaves_by_path(dict(params)))
    checkpointer.save(epath.Path(path).absolute(), args=ocp.args.PyTreeSave(arrays))


def read_tree(path: str | os.PathLike, sharding: tree.Placement | None = None) -> dict[str, Any]:
  """Reads what `write_tree` wrote, as numpy arrays, or shard by shard where `sharding` says."""
  quiet_orbax()
  path = epath.Path(path).absolute()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    leaves = tree.leaves_by_path(checkpointer.metadata(path).item_metadata.tree)
    arguments = tree.nest({names: tree.restore_argument(names, leaf.shape, sharding) for names, leaf in leaves.items()})
    return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
