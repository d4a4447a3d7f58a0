"""A bare parameter tree on disk, without a run around it, and fingerprints beside it by which changed bits are seen."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from vit_jax.checkpoints import tree
from vit_jax.checkpoints.fingerprints import fingerprints
from vit_jax.checkpoints.quiet import quiet_orbax
from vit_jax.checkpoints.reading import Damaged, brief

SEAL = "fingerprints.json"  # beside a tree

_log = logging.getLogger(__name__)


def write_tree(path: str | os.PathLike, params: Mapping[str, Any], text: str = "") -> None:
  """Writes a tree of arrays (nested dicts) to a new folder, and fingerprints of it to `SEAL` beside that.

  Args:
    path: the folder.
    params: the tree.
    text: what belongs to it and is sealed with it.
  """
  quiet_orbax()
  path = epath.Path(path).absolute()
  arrays = tree.leaves_by_path(dict(params))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree.nest(arrays)))
  seal = {"arrays": fingerprints(arrays), "sha256": _digest(text)}
  (path.parent / SEAL).write_text(json.dumps(seal, indent=2, sort_keys=True) + "\n")


def shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
  """The shapes of the arrays of a tree on disk by their paths, without reading them.

  Raises:
    Damaged: if it cannot be read.
  """
  return {"/".join(names): tuple(leaf.shape) for names, leaf in _leaves(epath.Path(path).absolute()).items()}


def read_tree(path: str | os.PathLike, sharding: tree.Placement | None = None, text: str = "") -> dict[str, Any]:
  """Reads what `write_tree` wrote, as numpy arrays, or shard by shard where `sharding` says; all of it is checked.

  Raises:
    Damaged: if it cannot be read, or is not what was written.
  """
  path = epath.Path(path).absolute()
  leaves = _leaves(path)
  arguments = tree.nest({names: tree.restore_argument(names, leaf.shape, sharding) for names, leaf in leaves.items()})
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      found = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
  except MemoryError:
    raise
  except Exception as error:  # orbax and tensorstore report damage as ValueError, KeyError, OSError, …
    raise Damaged(f"{path} cannot be read: {brief(error)}. Export the model again.") from error
  _verify(path.parent, found, text)
  return found


def _leaves(path: epath.Path) -> dict[tuple[str, ...], Any]:
  quiet_orbax()
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      described = checkpointer.metadata(path).item_metadata
      if described is None:  # of which orbax does not say more
        raise ValueError("the files that say which arrays are in it are damaged, or some are lost")
      return tree.leaves_by_path(described.tree)
  except MemoryError:
    raise
  except Exception as error:
    raise Damaged(f"{path} cannot be read: {brief(error)}. Export the model again.") from error


def _verify(folder: epath.Path, found: Mapping[str, Any], text: str) -> None:
  """Raises Damaged if arrays or text are not what was written beside the seal of a folder."""
  path = folder / SEAL
  if not path.exists():
    _log.warning("%s was exported without %s: it is not checked for changed bits.", folder, SEAL)
    return
  try:
    seal = json.loads(path.read_text())
    saved, digest = dict(seal["arrays"]), seal["sha256"]
  except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
    raise Damaged(f"{path} is damaged: {brief(error)}. Export the model again.") from error
  if digest != _digest(text):
    raise Damaged(
      f"{folder}: the description of the model was changed after the export: give other attributes when it is loaded, "
      f"or export it again. (Without {SEAL} it is opened unchecked.)"
    )
  now = fingerprints(tree.leaves_by_path(dict(found)))
  changed = [name for name in now.keys() | saved.keys() if saved.get(name) != now.get(name)]
  if changed:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise Damaged(
      f"{folder}: arrays are not what was exported, bits have changed: {', '.join(sorted(changed)[:3])}{more}. Export "
      "the model again."
    )


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
