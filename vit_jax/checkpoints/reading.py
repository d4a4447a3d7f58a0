"""Reading checkpoints: which steps there are, what a step holds, arrays whole or in part, each checked.

A step folder `<workdir>/checkpoints/<step>` has three items: `state` (arrays), `data` (the state of the data pipeline)
and `meta` (configuration, versions, metrics, the manifest of `state` and the fingerprints of its arrays). The two JSON
items carry their own checksum, so damage anywhere in a step is seen before its content is believed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vit_jax import files
from vit_jax.checkpoints import tree
from vit_jax.checkpoints.fingerprints import fingerprints
from vit_jax.checkpoints.quiet import quiet_orbax

FOLDER = "checkpoints"
FORMAT = 1  # of the step folder; raised when a change makes older programs misread newer steps
_JSON = "metadata"  # the file in which Orbax keeps a JSON item
T = TypeVar("T")


class Best(TypedDict):
  """Where a score was best so far."""

  step: int
  value: float


Leaves = Mapping[tuple[str, ...], Any]

_log = logging.getLogger(__name__)


class NotSaved(FileNotFoundError):
  """There is no such checkpoint."""


class Damaged(RuntimeError):
  """Steps exist, but what was asked for cannot be read from them."""


def steps(workdir: str | epath.PathLike) -> tuple[int, ...]:
  """The saved steps of a run, oldest first (saves still being written do not count, damaged ones do)."""
  folder = epath.Path(workdir) / FOLDER
  if not folder.is_dir():
    return ()
  return tuple(sorted(int(path.name) for path in folder.iterdir() if is_step(path.name) and _is_folder(path)))


def check_place(workdir: str | epath.PathLike) -> None:
  """Refuses a run whose folder of checkpoints is something else: there may be steps elsewhere, on a disk not mounted.

  Raises:
    Damaged: saying what is there.
  """
  folder = epath.Path(workdir) / FOLDER
  if folder.is_dir() or not os.path.lexists(folder):
    return
  what = f"is a link to {os.readlink(folder)}, where no folder is" if os.path.islink(folder) else "is no folder"
  raise Damaged(f"{folder}: {what}; put back what was there, or remove it to start from zero on purpose.")


def is_step(name: str) -> bool:
  """Whether this is the name of a step's folder: its number as Python writes it."""
  return re.fullmatch(r"0|[1-9][0-9]{0,17}", name) is not None


def _is_folder(path: epath.Path) -> bool:
  """Whether a step may be there: also behind a link that leads nowhere (now), which is damage and to be said."""
  return path.is_dir() or os.path.islink(path)


def latest(workdir: str | epath.PathLike) -> int | None:
  """The newest saved step of a run; None where nothing was saved."""
  return max(steps(workdir), default=None)


def read_meta(workdir: str | epath.PathLike, step: int | None = None) -> dict[str, Any]:
  """What a step (None: the newest readable one) says of itself: step, config, metrics, versions, manifest."""
  return first_readable(workdir, step, lambda folder: read_json(folder, "meta"))[1]


def restore_params(
  workdir: str | epath.PathLike,
  path: tuple[str, ...] = ("teacher", "backbone"),
  step: int | None = None,
  sharding: tree.Placement | None = None,
) -> dict[str, Any]:
  """Reads one subtree of a saved state as numpy arrays, on any machine, whatever devices wrote it.

  Args:
    workdir: the run.
    path: names that lead to the subtree in the state.
    step: the step; None: the newest that can be read.
    sharding: how an array of the subtree, by its path and shape, is spread over devices: it is then read shard by
      shard, as a jax array.

  Raises:
    NotSaved: if nothing was saved (or not that step).
    Mismatch: if the state has no such subtree; says what it has.
    Damaged: if no step can be read.
  """

  def read(folder: epath.Path) -> dict[str, Any]:
    meta = read_json(folder, "meta")
    manifest = meta["manifest"]
    prefix = "".join(f"{name}/" for name in path)
    inside = [tuple(name.split("/")) for name in manifest if name.startswith(prefix)]
    if not inside:
      raise tree.Mismatch(_no_subtree(manifest, path, folder))
    wanted = {
      names: tree.restore_argument(names[len(path) :], manifest["/".join(names)]["shape"], sharding) for names in inside
    }
    arrays = read_arrays(folder, wanted, wanted, partial=True)
    verify(meta, arrays)
    return tree.nest({names[len(path) :]: array for names, array in arrays.items()})

  return first_readable(workdir, step, read)[1]


def first_readable(
  workdir: str | epath.PathLike,
  step: int | None,
  read: Callable[[epath.Path], T],
  check: Callable[[T], None] = lambda result: None,
  everyone: Callable[[int], Sequence[int]] = lambda value: [value],
) -> tuple[int, T, tuple[int, ...]]:
  """Applies `read` and then `check` to the folder of `step`, or (None) of the newest step on which both succeed.

  A request that does not fit (`Mismatch`) is raised at once; any other failure is damage: it is logged as a warning and
  the next older step is tried, never silently.

  Args:
    workdir: the run.
    step: the step, or None.
    read: what one process can do by itself.
    check: what processes do together, when all have read; the outcome must be the same on all.
    everyone: tells all processes a number and returns those of all: what one cannot read, all leave.

  Returns:
    The step, what `read` made of it, and the newer steps that failed.
  """
  quiet_orbax()
  available = steps(workdir)
  root = epath.Path(workdir).expanduser().absolute() / FOLDER  # Orbax reads absolute paths only
  if step is not None and step not in available:
    raise NotSaved(f"{root} has no step {step}; it has {list(available) or 'none'}.")
  if min(everyone(len(available))) == 0:
    raise NotSaved(f"{root} has no saved step{'' if not available else ' on another process: share the folder'}.")
  failed: dict[int, Exception] = {}
  candidates = [step] if step is not None else list(reversed(available))
  while (candidate := min(everyone(candidates[0] if candidates else -1))) >= 0:  # what not all see is none
    try:
      result = _together(read, root / str(candidate), everyone)
      check(result)
      return candidate, result, tuple(failed)
    except (tree.Mismatch, MemoryError):
      raise
    except Exception as error:  # orbax and tensorstore report damage as ValueError, KeyError, OSError, …
      failed[candidate] = error
    candidates = [older for older in candidates if older < candidate]
    then = f"trying step {candidates[0]} instead" if candidates else "no older step is left to try"
    _log.warning("Checkpoint %s cannot be read (%s); %s.", root / str(candidate), brief(failed[candidate]), then)
  lines = "\n".join(f"  step {number}: {brief(error)}" for number, error in failed.items())
  raise Damaged(
    f"None of the saved steps in {root} can be read:\n{lines}\nRepair or restore them from a copy. To start from zero "
    "on purpose, move that folder away or give a new --workdir."
  ) from next(iter(failed.values()))


def _together(read: Callable[[epath.Path], T], folder: epath.Path, everyone: Callable[[int], Sequence[int]]) -> T:
  """What `read` makes of a folder, if it succeeds on all processes."""
  failure: BaseException | None = None
  try:
    result = read(folder)
  except Exception as error:
    failure = error
  wrong_request = isinstance(failure, (tree.Mismatch, MemoryError))
  outcomes = list(everyone(2 if wrong_request else 1 if failure else 0))  # nobody may wait for one that has gone
  if failure is not None and (wrong_request or max(outcomes) < 2):
    raise failure
  if max(outcomes) == 2:
    raise tree.Mismatch(f"process {outcomes.index(2)} cannot restore {folder}: see its message.")
  if max(outcomes):
    raise OSError(f"process {outcomes.index(1)} cannot read it")
  return result


def verify(meta: Mapping[str, Any], arrays: Leaves) -> None:
  """Compares arrays (by their path in the state) with the fingerprints that were taken when they were saved.

  Raises:
    OSError: naming the arrays that are not what was saved.
  """
  saved = meta.get("fingerprints")
  if saved is None:
    _log.warning("Step %s was saved without fingerprints: its arrays are not checked for changed bits.", meta["step"])
    return
  changed = [name for name, number in fingerprints(arrays).items() if saved[name] != number]
  if changed:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise OSError(f"arrays are not what was saved, bits have changed: {', '.join(changed[:3])}{more}")


def sealed(value: Any) -> dict[str, Any]:
  """JSON data with its checksum, as `read_json` expects it."""
  return {"sha256": _digest(value), "value": value}


def read_json(folder: epath.Path, item: str) -> Any:
  """The JSON item of a step folder, checked against its checksum."""
  path = folder / item
  if os.path.islink(folder) and not folder.exists():
    raise OSError(f"it is a link to {os.readlink(folder)}, where nothing is")
  if not path.exists():
    raise OSError(f"its folder {item!r} is missing")
  _check_regular(path / _JSON)
  try:
    content = _alone(ocp.JsonCheckpointHandler()).restore(path, args=ocp.args.JsonRestore())
  except (ValueError, RecursionError) as error:  # of the text or of JSON
    raise OSError(f"{item!r} is damaged: it cannot be read as JSON") from error
  intact = isinstance(content, dict) and set(content) == {"sha256", "value"}
  if not intact or content["sha256"] != _digest(content["value"]):
    raise OSError(f"the content of {item!r} does not match its checksum")
  value = content["value"]
  if item == "meta" and value["format"] != FORMAT:
    raise tree.Mismatch(f"{folder} has checkpoint format {value['format']}, this vit_jax reads format {FORMAT}.")
  if item == "meta" and is_step(folder.name) and value["step"] != int(folder.name):
    raise OSError(f"it holds step {value['step']}: was it copied or linked under another name?")
  return value


def rewrite_json(folder: epath.Path, item: str, value: Any) -> None:
  """Puts another value in the place of a JSON item of a step folder, at once."""
  files.write_json(folder / item / _JSON, sealed(value))


def read_arrays(
  folder: epath.Path, abstract: Leaves, arguments: Leaves, *, partial: bool
) -> dict[tuple[str, ...], Any]:
  """The arrays of a step folder named by the keys of `abstract`, read with Orbax's restore `arguments` for each."""
  path = folder / "state"
  check_state(path)
  request = ocp.args.PyTreeRestore(item=tree.nest(abstract), restore_args=tree.nest(arguments), partial_restore=partial)
  restored = tree.leaves_by_path(_alone(ocp.PyTreeCheckpointHandler()).restore(path, args=request))
  absent = [
    "/".join(names) for names in abstract if not isinstance(restored.get(names), (np.ndarray, np.generic, jax.Array))
  ]
  if absent:  # a partial restore leaves what it did not find as it was asked for
    raise OSError(f"these arrays are missing: {', '.join(absent)}")
  return restored


def check_state(path: epath.Path) -> None:
  """Looks at what Orbax and tensorstore read first, and of which they do not say in words that it is damaged.

  Raises:
    OSError: if it cannot be read.
  """
  if not path.exists():
    raise OSError("its folder 'state' is missing")
  for name in ("_METADATA", "manifest.ocdbt"):
    _check_regular(path / name)
  if (described := path / "_METADATA").exists():
    try:
      files.parse_json(described.read_bytes(), "state/_METADATA", kind=dict)
    except files.DamagedFile as error:
      raise OSError(str(error)) from error


def _check_regular(path: epath.Path) -> None:
  """Refuses what would be waited for, or read without an end: a pipe, a device."""
  if os.path.exists(path) and not os.path.isfile(path):
    raise OSError(f"{path.parent.name}/{path.name} is no file")


def _alone(handler: ocp.CheckpointHandler) -> ocp.Checkpointer:
  """A reader that does not wait for other processes: one that fails would leave them waiting for ever."""
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
  )
  return ocp.Checkpointer(handler, multiprocessing_options=options)


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def brief(error: Exception) -> str:
  """An error in one line; of tensorstore's what matters, of another long one its beginning and its end."""
  text = " ".join(str(error).split())
  system = re.search(r"([^:\"]+) \[os_error_code", text)
  if system is not None:
    return system[1].strip()
  array = re.match(r'(?:DATA_LOSS|NOT_FOUND): Error opening "zarr\d?" driver: [^"]*"([^"]+)/\.z', text)
  if array is not None:
    return f"the files of its arrays are damaged or missing (first met for {array[1].replace('.', '/')})"
  return f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:100]} … {text[-200:]}'}"


def _no_subtree(manifest: tree.Manifest, path: tuple[str, ...], folder: epath.Path) -> str:
  depth = 0
  while any(name.startswith("".join(f"{part}/" for part in path[: depth + 1])) for name in manifest):
    depth += 1
  prefix = "".join(f"{part}/" for part in path[:depth])
  there = sorted({name[len(prefix) :].split("/")[0] for name in manifest if name.startswith(prefix)})
  return f"{folder} holds no {'/'.join(path)!r}: {prefix or 'the state'} has {', '.join(there)}."
