"""What a run's folder holds: whole steps, damaged ones, what interrupted writes left, what was set aside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vit_jax.checkpoints import reading, tree
from vit_jax.checkpoints.quiet import quiet_orbax

SET_ASIDE = "checkpoints_damaged"  # folder of steps that could not be read when the run went on
UNFINISHED = (
  ".orbax-checkpoint-tmp"  # in the names of folders of steps that are being written, or never were to the end
)
_AT_ONCE = 1 << 30  # bytes of arrays in memory while they are checked


class Found(NamedTuple):
  """A folder in which a step is, or was to be.

  Attributes:
    path: below the run's folder.
    state: "whole" (as far as it was looked at), "damaged", "unfinished", "set aside" or "no step".
    problem: what is wrong; empty for a whole step.
    size: bytes on disk.
    meta: what the step says of itself; None where that cannot be read.
  """

  path: str
  state: str
  problem: str
  size: int
  meta: dict[str, Any] | None


def survey(workdir: str | epath.PathLike, *, verify: bool = False) -> list[Found]:
  """Looks at every step of a run, oldest first, then at what is no step (any more).

  Args:
    workdir: the run.
    verify: read every array and compare its fingerprint; otherwise that the arrays are there.

  Raises:
    NotSaved: if the folder holds no checkpoint of any kind.
    Damaged: if the place of the checkpoints is no folder.
  """
  reading.check_place(workdir)
  quiet_orbax()
  workdir = epath.Path(workdir).expanduser().absolute()
  root, aside = workdir / reading.FOLDER, workdir / SET_ASIDE
  found = [_look(root / str(step), verify) for step in reading.steps(workdir)]
  if root.is_dir():
    found += [
      Found(f"{reading.FOLDER}/{path.name}", "unfinished", "written now, or interrupted", _size(path), None)
      for path in sorted(root.iterdir())
      if UNFINISHED in path.name
    ]
    other = "not used: it is no folder that a step number names"
    found += [
      Found(f"{reading.FOLDER}/{path.name}", "no step", other, _size(path), None)
      for path in sorted(root.iterdir())
      if _is_other(path)
    ]
  if aside.is_dir():
    found += [
      Found(f"{SET_ASIDE}/{path.name}", "set aside", "could not be read when the run went on", _size(path), None)
      for path in sorted(aside.iterdir())
    ]
  if not found:
    raise reading.NotSaved(f"{root} has no saved step.")
  return found


def _is_other(path: epath.Path) -> bool:
  """Whether this is neither a step, whole or not, nor what Orbax writes beside the steps."""
  if UNFINISHED in path.name or path.name.startswith(("_", ".")) or path.name in ("metadata", "descriptor"):
    return False
  return not (reading.is_step(path.name) and (path.is_dir() or os.path.islink(path)))


def _look(folder: epath.Path, verify: bool) -> Found:
  meta, problem = None, ""
  try:
    meta = reading.read_json(folder, "meta")
    reading.read_json(folder, "data")
    _check_presence(folder, meta)
    if verify:
      _check_content(folder, meta)
  except Exception as error:  # orbax and tensorstore report damage as ValueError, KeyError, OSError, …
    problem = reading.brief(error)
  state = "damaged" if problem else "whole"
  return Found(f"{reading.FOLDER}/{folder.name}", state, problem, _size(folder), meta)


def _check_presence(folder: epath.Path, meta: dict[str, Any]) -> None:
  reading.check_state(folder / "state")
  there = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
  names = {"/".join(path) for path in tree.leaves_by_path(there)}
  absent = sorted(set(meta["manifest"]) - names)
  if absent:
    raise OSError(f"these arrays are missing: {', '.join(absent[:3])}")


def _check_content(folder: epath.Path, meta: dict[str, Any]) -> None:
  for part in _parts(meta["manifest"]):
    wanted = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in part}
    reading.verify(meta, reading.read_arrays(folder, wanted, wanted, partial=True))


def _parts(manifest: tree.Manifest) -> Iterator[list[tuple[str, ...]]]:
  """The arrays in groups that fit into memory together."""
  part, size = [], 0
  for name, entry in manifest.items():
    part.append(tuple(name.split("/")))
    size += 4 * int(np.prod(entry["shape"], dtype=np.int64))
    if size >= _AT_ONCE:
      yield part
      part, size = [], 0
  if part:
    yield part


def _size(path: epath.Path) -> int:
  """Bytes of all files; of what leads nowhere, or is removed meanwhile by the run, none."""
  try:
    if not path.is_dir():
      return path.stat().length
    return sum(_size(entry) for entry in path.iterdir())
  except OSError:
    return 0
