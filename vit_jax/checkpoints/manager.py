"""Saving runs so that a kill, a power cut or a bad disk costs at most the newest step, and resuming them exactly."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from vit_jax.checkpoints import reading, tree
from vit_jax.checkpoints.fingerprints import fingerprints
from vit_jax.checkpoints.listing import SET_ASIDE, UNFINISHED
from vit_jax.checkpoints.quiet import quiet_orbax

MAX_FAILURES = 3  # saves in a row that may fail before the run is stopped

_log = logging.getLogger(__name__)


class NotWritten(RuntimeError):
  """Steps could not be saved; what was saved before is untouched."""


class Restored(NamedTuple):
  """A saved step."""

  step: int
  state: Any
  data_state: dict[str, Any]
  config: dict[str, Any]
  metrics: dict[str, float]
  evaluated: bool
  best: dict[str, reading.Best]


class _Kept:
  """Orbax's policy for steps that are kept whatever their age: those named, and links to elsewhere."""

  def __init__(self, folder: epath.Path):
    self._folder = folder
    self.steps: set[int] = set()

  def should_preserve(self, infos: Sequence[Any], *, context: Any) -> list[bool]:
    return [info.step in self.steps or os.path.islink(self._folder / str(info.step)) for info in infos]


class Checkpoints:
  """The checkpoints of one run, in `<workdir>/checkpoints/<step>`.

  Saving is asynchronous (the call returns when the arrays are copied from the device) and atomic (a step is written
  under a temporary name and renamed when it is whole). A save that fails, for want of space for example, leaves the
  earlier steps as they are and is logged as an error; the third in a row raises `NotWritten`, and so does any where
  several processes write. Creating this object touches nothing; the first save clears what interrupted writes left
  behind and moves steps that `restore` found damaged to `<workdir>/checkpoints_damaged`.

  Args:
    workdir: the run's folder, local or on any file system that etils.epath knows.
    keep: how many of the newest steps are kept. Two or more survive damage to the newest.
    keep_every: steps divisible by this are kept for ever; None: no such steps.

  A step that is a symbolic link is read like any other; neither the link nor what it leads to is ever removed.
  """

  def __init__(self, workdir: str | epath.PathLike, *, keep: int = 3, keep_every: int | None = None):
    if keep < 1:
      raise ValueError(f"checkpoint.keep must be at least 1, got {keep}.")
    if keep_every is not None and keep_every < 1:
      raise ValueError(f"checkpoint.keep_every must be at least one step (or None), got {keep_every}.")
    quiet_orbax()
    self._workdir = epath.Path(workdir).expanduser().absolute()
    self._kept = _Kept(self._workdir / reading.FOLDER)
    self._preserve = [LatestN(keep), self._kept] + ([EveryNSteps(keep_every)] if keep_every else [])
    self._damaged: tuple[int, ...] = ()
    self._manager: ocp.CheckpointManager | None = None
    self._writing: int | None = None  # the step whose save was begun last and is not known to have ended
    self._failures = 0  # in a row
    self._error: Exception | None = None  # of the last of them

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    if error is None:
      self.close()
      return
    try:  # the error on its way matters more
      self.close()
    except NotWritten:  # it is logged
      pass
    except Exception as failure:
      _log.warning("The checkpoints could not be closed: %s", reading.brief(failure))

  def keep_best(self, best: Mapping[str, reading.Best]) -> None:
    """From the next save on, these steps are kept beside the newest ones, and no longer those named before."""
    self._kept.steps = {found["step"] for found in best.values()}

  def latest_step(self) -> int | None:
    """The newest step on disk, readable or not; None only where nothing was saved."""
    return reading.latest(self._workdir)

  def save(
    self,
    step: int,
    state: Any,
    data_state: dict[str, Any],
    config: dict[str, Any],
    metrics: Mapping[str, Any],
    *,
    evaluated: bool = True,
    best: Mapping[str, reading.Best] | None = None,
  ) -> bool:
    """Starts saving a step; the state may be donated as soon as this returns.

    Args:
      step: its number.
      state: any pytree of arrays and typed PRNG keys.
      data_state: JSON-able state of the data pipeline.
      config: the resolved configuration, as JSON-able dict.
      metrics: scalars so far.
      evaluated: False if the evaluation of this step is still to be made.
      best: the best steps so far, by score.

    Returns:
      False if the step is already saved; that save stays as it is.
    """
    self._settle()
    if step in reading.steps(self._workdir) and step not in self._damaged:
      _log.warning("Step %d is already saved in %s; kept as it is.", step, self._workdir / reading.FOLDER)
      return False
    leaves = tree.leaves_by_path(state)
    plain = {path: tree.plain(leaf) for path, leaf in leaves.items()}
    meta = dict(
      format=reading.FORMAT,
      step=step,
      config=config,
      metrics={name: float(value) for name, value in metrics.items()},
      evaluated=evaluated,
      best=dict(best or {}),
      versions=_versions(),
      devices=jax.device_count(),
      processes=jax.process_count(),
      saved_at=round(time.time(), 3),
      manifest=tree.manifest(leaves),
      fingerprints=fingerprints(plain),
    )
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(tree.nest(plain)),
      data=ocp.args.JsonSave(reading.sealed(data_state)),
      meta=ocp.args.JsonSave(reading.sealed(meta)),
    )
    try:
      if self._manager is None:
        self._manager = self._open_for_writing()
      self._manager.save(step, args=items, force=True)  # the caller decides when; orbax must not skip
      self._writing = step
    except OSError as error:
      self._writing = step
      self._failed(error)
    return True

  def evaluated(self, step: int, metrics: Mapping[str, Any], best: Mapping[str, reading.Best]) -> None:
    """Says in a saved step that its evaluation, which was still to be made, has been made since; with its results."""
    self.wait()
    if jax.process_index() == 0 and step in reading.steps(self._workdir):
      folder = self._workdir / reading.FOLDER / str(step)
      made = {"metrics": {name: float(value) for name, value in metrics.items()}, "evaluated": True, "best": dict(best)}
      reading.rewrite_json(folder, "meta", reading.read_json(folder, "meta") | made)

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
    """Restores a step into the structure, shapes, dtypes and shardings of `abstract_state`.

    Args:
      abstract_state: the state as arrays or `jax.ShapeDtypeStruct`s; a struct without sharding is restored onto the
        first local device.
      step: the step; None: the newest that can be read. Steps that cannot are named in a warning and set aside by the
        next save.

    Raises:
      NotSaved: if nothing was saved (or not that step).
      Mismatch: if the checkpoint holds other leaves, shapes or dtypes; names all of them, before reading arrays.
      Damaged: if steps exist but none can be read.
    """
    self.wait()
    leaves = tree.leaves_by_path(abstract_state)

    def read(folder: epath.Path) -> tuple[dict, dict, dict]:
      meta, data_state = reading.read_json(folder, "meta"), reading.read_json(folder, "data")
      saved = tree.as_saved(leaves, meta["manifest"])
      tree.check(meta["manifest"], tree.manifest(saved), str(folder))
      plain = {path: tree.plain(leaf) for path, leaf in saved.items()}
      arguments = {path: _restore_arguments(leaf) for path, leaf in plain.items()}
      return meta, data_state, reading.read_arrays(folder, plain, arguments, partial=False)

    def check(result: tuple[dict, dict, dict]) -> None:
      reading.verify(result[0], result[2])

    found, (meta, data_state, arrays), damaged = reading.first_readable(self._workdir, step, read, check, _everyone())
    self._damaged = damaged
    restored = [tree.like(arrays[path], leaf) for path, leaf in tree.as_saved(leaves, meta["manifest"]).items()]
    state = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract_state), restored)
    return Restored(
      found,
      state,
      data_state,
      meta["config"],
      meta["metrics"],
      meta.get("evaluated", True),
      meta.get("best", {}),
    )

  def poll(self) -> None:
    """Notices, without waiting, whether the save in the background has ended and how; cheap enough for every step.

    Raises:
      NotWritten: if it failed and was one too many.
    """
    if self._manager is not None and self._writing is not None and not self._manager.is_saving_in_progress():
      self._settle()

  def wait(self) -> None:
    """Returns when everything saved is on disk.

    Raises:
      NotWritten: if the newest save failed.
    """
    self._settle(last=True)

  def close(self) -> None:
    """Waits and frees the writer's threads.

    Raises:
      NotWritten: if the newest save failed.
    """
    try:
      self.wait()
    finally:
      self._drop_manager()

  def _settle(self, *, last: bool = False) -> None:
    """Waits for the save in the background and takes note of its end."""
    if self._manager is None or self._writing is None:
      if last and self._failures:
        raise self._not_written()
      return
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # whatever orbax and tensorstore make of a full disk, a lost mount, …
      self._failed(error, last=last)
    else:
      self._writing, self._failures = None, 0

  def _failed(self, error: Exception, *, last: bool = False) -> None:
    self._failures += 1
    _log.error(
      "Step %d could not be saved: %s. The newest checkpoint is %s.",
      self._writing,
      reading.brief(error),
      self.latest_step() or "none",
    )
    self._writing, self._error = None, error
    self._drop_manager()  # with what it believes to be there; the next save opens another, which clears the remains
    if last or self._failures >= MAX_FAILURES or jax.process_count() > 1:
      raise self._not_written() from error

  def _not_written(self) -> NotWritten:
    folder, newest = self._workdir / reading.FOLDER, self.latest_step()
    times = "" if self._failures == 1 else f" {self._failures} times in a row"
    return NotWritten(
      f"{folder}: saving failed{times}, the last time with {reading.brief(self._error)}. "
      + (f"Step {newest} is whole: " if newest is not None else "Nothing has been saved: ")
      + "put right what is wrong (is the disk full? a step needs its space before the oldest is removed: see "
      "checkpoint.keep), then the same command goes on."
    )

  def _drop_manager(self) -> None:
    manager, self._manager = self._manager, None
    if manager is not None:
      with contextlib.suppress(Exception):  # it repeats the failure that was reported
        manager.close()

  def _open_for_writing(self) -> ocp.CheckpointManager:
    folder = self._workdir / reading.FOLDER
    if jax.process_index() == 0:
      folder.mkdir(parents=True, exist_ok=True)
      for leftover in folder.glob(f"*{UNFINISHED}*"):
        if leftover.is_dir() and not os.path.islink(leftover):
          leftover.rmtree()
        else:
          leftover.unlink()
      for step in self._damaged:
        self._set_aside(folder / str(step))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("vit_jax.checkpoints: folder ready")
    self._damaged = ()
    options = ocp.CheckpointManagerOptions(
      preservation_policy=AnyPreservationPolicy(self._preserve),
      enable_async_checkpointing=True,
      cleanup_tmp_directories=False,
    )
    return ocp.CheckpointManager(folder, options=options, item_names=("state", "data", "meta"))

  def _set_aside(self, step: epath.Path) -> None:
    aside = self._workdir / SET_ASIDE
    aside.mkdir(parents=True, exist_ok=True)
    target, number = aside / step.name, 1
    while target.exists():
      target, number = aside / f"{step.name}.{number}", number + 1
    step.rename(target)
    _log.warning("Moved the damaged checkpoint %s to %s.", step, target)


def _everyone() -> Callable[[int], Sequence[int]]:
  """What tells all processes a number and returns those of all."""
  if jax.process_count() == 1:
    return lambda value: [value]
  return lambda value: [int(number) for number in multihost_utils.process_allgather(np.int32(value))]


def _restore_arguments(leaf: Any) -> ocp.ArrayRestoreArgs:
  sharding = getattr(leaf, "sharding", None)
  if not isinstance(sharding, jax.sharding.Sharding):
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=sharding, global_shape=np.shape(leaf))


def _versions() -> dict[str, str]:
  names = ("vit-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  found = {"python": platform.python_version()}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed as a package"
  return found
