"""The training loop: the only one, whatever the method.

    prepare -> state (fresh or restored) -> for every step: batch, compiled step, and what is due: log, score, save

Metrics are fetched one step late, so that the host never waits for the step it has just started.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax import parallel
from vit_jax.checkpoints import Checkpoints, NotWritten, check_place, latest, steps
from vit_jax.config import UserError
from vit_jax.data.views import Views, on_one_device
from vit_jax.evaluation.names import headline
from vit_jax.inspect import pictures
from vit_jax.methods import State
from vit_jax.parallel import processes
from vit_jax.train import frozen, setup, starting
from vit_jax.train import goodput as goodputs
from vit_jax.train.alone import alone
from vit_jax.train.best import Records
from vit_jax.train.caching import caching
from vit_jax.train.compiling import CompiledSteps, compiler_options
from vit_jax.train.evaluations import Evaluations
from vit_jax.train.goodput import Goodput
from vit_jax.train.interrupts import GivenUp, Interrupts, Stopped
from vit_jax.train.nonfinite import Guard, dump, how_to_go_on
from vit_jax.train.prefetch import prefetch
from vit_jax.train.progress import Progress
from vit_jax.train.saving import SaveTimes
from vit_jax.train.setup import abstract_state
from vit_jax.train.summary import SUMMARY, write_summary
from vit_jax.train.watch import Watch
from vit_jax.train.writers import METRICS, Writers, read_lines

log = logging.getLogger(__name__)

Batch = Mapping[str, jax.Array]
PICTURED = 8  # images of the batch that is shown
_HASTE = 1.0  # seconds for the readers of data when the run was stopped or failed
LOOK_AHEAD = 1000  # steps among which the resolutions are sought that are to be compiled ahead


def _check_processes(config: ConfigDict, folder: Path) -> None:
  """All processes must do the same, or they would wait for each other for ever."""
  text = json.dumps(configs.to_dict(config), sort_keys=True, default=str)
  processes.check_same("the config", f"one with the fingerprint {hashlib.sha256(text.encode()).hexdigest()[:12]}")
  step = latest(folder)
  newest = "no checkpoint" if step is None else f"a checkpoint of step {step}"
  processes.check_same("what is in the workdir, which all machines must share,", f"{newest} in {folder}")


def train(config: ConfigDict, workdir: str, *, accept_config_change: bool = False) -> State:
  """Trains, or goes on where the run in `workdir` was interrupted; returns the last state.

  Raises:
    ConfigError: before the first compile, if the config cannot work or differs from the run's.
    Stopped: after saving, if the process was asked to stop.
    UserError: if another run is in `workdir`, if there can be no such folder, if the loss is no longer finite, or if
      the disk is full.
  """
  folder = Path(workdir).expanduser().absolute()
  interrupts = Interrupts(grace=config.checkpoint.grace)
  try:
    with interrupts, alone(folder), caching(config.compilation_cache, folder):
      goodput = Goodput(folder)
      return _train(config, folder, goodput, interrupts, accept_config_change=accept_config_change)
  except OSError as error:
    if error.errno in _FULL:
      raise UserError(_refused(folder, error)) from error
    if place := _inside(folder, error):
      text = f"{place}: {error.strerror}; put it right or move it away, then the same command goes on"
      raise UserError(text) from error
    raise


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what a disk says that takes no more


def _inside(folder: Path, error: OSError) -> Path | None:
  """The file of the workdir with which something is wrong: a folder in its place, no permission, a link in circles."""
  names = [name for name in (error.filename2, error.filename) if isinstance(name, str | os.PathLike)]
  return next((Path(name) for name in names if Path(name).is_relative_to(folder)), None)


def _refused(folder: Path, error: OSError) -> str:
  newest = latest(folder)
  saved = "nothing has been saved" if newest is None else f"step {newest} is saved"
  return (
    f"--workdir={folder}: cannot be written to ({error.strerror}); {saved}. Put right what is wrong (is the disk "
    "full?), then the same command goes on."
  )


def _train(
  config: ConfigDict, folder: Path, goodput: Goodput, interrupts: Interrupts, *, accept_config_change: bool
) -> State:
  check_place(folder)
  _check_processes(config, folder)
  run = frozen.pin(setup.prepare(setup.grouped_as_begun(config, folder)), folder)
  sources = [] if latest(folder) is not None else starting.open_sources(run, abstract_state(run))
  setup.remember(run.config, folder, accept_change=accept_config_change)
  for name, value in setup.describe(run).items():
    log.info("%-13s %s", name, value)
  keep_every = run.config.checkpoint.keep_every
  checkpoints = Checkpoints(
    folder, keep=run.config.checkpoint.keep, keep_every=keep_every and run.steps("checkpoint.keep_every")
  )
  with checkpoints:
    loop = _Loop(run, folder, checkpoints, sources, goodput, interrupts, accept_config_change=accept_config_change)
    return loop.run_to_end()


@contextlib.contextmanager
def mesh_context(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Where steps are traced: the mesh, and what the logical axes of activations mean on it.

  Initialisation and pictures stay outside: their few images do not divide over the axes.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(parallel.ACTIVATION_AXES):
    yield


def abstract_batch(run: setup.Run, views: Views) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes, types and shardings of a batch of one resolution."""
  sharding = parallel.batch_sharding(run.mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
    for name, (shape, kind) in views.arrays(run.config.batch_size).items()
  }


def make_step(run: setup.Run, views: Views) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """One step of the method on batches of a variant of its views, whose part on the device comes first."""
  step = run.method.make_step(run.config)

  def training_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    return step(state, views.on_device(batch, run.mesh, parallel.BATCH_AXES))

  return training_step


def jitted_step(run: setup.Run, state: State, views: Views) -> Any:
  """The training step for `jax.jit`'s stages; the state is donated and keeps the shardings of the abstract `state`.

  It may be traced once: more would compile for minutes in the middle of it, unnoticed.
  """
  chex.clear_trace_counter()  # it knows a function by its place: this is another than any before
  step = chex.assert_max_traces(make_step(run, views), n=1)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  options = compiler_options(run.mesh.devices.flat[0].platform)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def fresh_state(run: setup.Run) -> State:
  """A new state, every array born on its devices; without the frozen teacher, which a file holds."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run).saved())
  init = jax.jit(lambda key: run.init(key).saved(), out_shardings=shardings)
  return init(jax.random.key(run.config.seed))


def bad_records_file() -> str:
  """Where this process lists the unreadable images among its own."""
  return f"bad_records_{jax.process_index()}.jsonl" if jax.process_index() else "bad_records.jsonl"


def _running(pending: tuple[int, dict[str, jax.Array]] | None) -> bool:
  """Whether the devices are still at the step whose metrics these will be."""
  return pending is not None and not all(x.is_ready() for x in pending[1].values() if isinstance(x, jax.Array))


def _of_first(answer: bool) -> bool:
  """What the first process says: scores of other machines may differ in the last digit, and all must do the same."""
  return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


class _Loop:
  """One process's part of a run: the state and everything that is written."""

  def __init__(
    self,
    run: setup.Run,
    workdir: Path,
    checkpoints: Checkpoints,
    sources: list[starting.Opened],
    goodput: Goodput,
    interrupts: Interrupts,
    *,
    accept_config_change: bool,
  ):
    self.run, self.workdir, self.checkpoints = run, workdir, checkpoints
    self.goodput, self.interrupts = goodput, interrupts
    self.total = run.steps("duration")
    self.local = parallel.LocalBatch(parallel.batch_sharding(run.mesh))
    self.pipeline = setup.open_pipeline(run, self.local, bad_records=workdir / bad_records_file())
    self.last_metrics: dict[str, float] = {}  # the last value of each
    self.programs: set[Views] = set()  # variants for which a step has run
    self.records = Records.of(run)
    self.evaluated = True  # unless the evaluation of this step is due and not made
    self.data_state: dict[str, Any] = {}  # behind the batch of this step
    self.saved_step: int | None = None
    try:
      self.step_number, self.state = self._start(sources, accept_config_change)
    except BaseException:
      self.pipeline.close(_HASTE)
      raise
    self.first_step = self.interrupts.step = self.step_number
    teacher = abstract_state(run).frozen
    if teacher is not None:
      self.state = self.state.replace(frozen=frozen.params_on_devices(run, teacher))
    self.health = self._watch()
    self.evaluations = Evaluations(run)

  def _watch(self) -> Watch:
    """The watch over the metrics, told again how the run began."""
    health = Watch(self.run.config, self.total)
    for line in read_lines(self.workdir / METRICS, say=False):  # the writers say what is damaged
      if line["step"] <= self.step_number:
        health.check(int(line["step"]), {name: value for name, value in line.items() if name != "step"})
    return health

  def _start(self, sources: list[starting.Opened], accept_config_change: bool) -> tuple[int, State]:
    if self.checkpoints.latest_step() is None:
      reached = max((line["step"] for line in read_lines(self.workdir / METRICS, say=False)), default=0)
      if reached:
        log.warning("No step was saved although %s reaches step %d: starting from zero.", METRICS, reached)
      log.info("%s", starting.report(sources))
      self.pipeline.start()  # the first batches are made while everything else is made ready
      state = starting.begin(fresh_state(self.run), sources)
      sources.clear()  # they may hold whole files
      return 0, state
    with self.goodput.measuring("restore"):
      restored = self.checkpoints.restore(abstract_state(self.run).saved())
    try:
      self.pipeline.set_state(restored.data_state, exact=not accept_config_change)
    except ValueError as error:
      raise UserError(f"data.source={self.run.config.data.source}: {error} with --accept_config_change") from error
    if restored.step < self.total:
      self.pipeline.start()
    self.last_metrics, self.data_state = restored.metrics, restored.data_state
    self.saved_step, self.evaluated = restored.step, restored.evaluated
    lines = read_lines(self.workdir / METRICS, say=False)
    reached = int(max((line["step"] for line in lines), default=0))
    if reached < restored.step - restored.step % restored.config["log"]["every"]:
      log.warning(
        "%s reaches step %d only: what was written until step %d is lost.", METRICS, reached, restored.step
      )
    self.records.go_on(restored.best, lines, steps(self.workdir), restored.step)
    self.checkpoints.keep_best(self.records.best)
    setup.compare_checkpoint(self.run.config, restored.config, restored.step)
    log.info("Going on from step %d of %d.", restored.step, self.total)
    return restored.step, restored.state

  def run_to_end(self) -> State:
    try:
      if self.step_number >= self.total and self.evaluated:
        log.info("The run is complete: nothing left to do.")
      else:
        with Writers(
          self.workdir,
          tensorboard=self.run.config.log.tensorboard,
          resume_step=self.step_number,
          active=jax.process_index() == 0,
        ) as self.writers:
          self._train()
        with self.goodput.measuring("checkpoint"):
          self.checkpoints.wait()
    except BaseException as error:
      self._end(error)
      raise
    self._finish()
    return self.state

  def _end(self, error: BaseException) -> None:
    """What a run leaves that was stopped, or failed; the reason matters more than what goes wrong here."""
    self.goodput.write()
    self._summarise(ended=error)
    try:
      self.pipeline.close(_HASTE)
    except Exception as failure:
      log.warning("The data could not be closed: %s", failure)

  def _finish(self) -> None:
    self.pipeline.close()
    if self.step_number > self.first_step:
      self.goodput.write()
      log.info("%s", goodputs.describe(self.goodput.starts()))
    path = self._summarise()
    if path is not None:
      log.info("%d of %d steps are done. Summary: %s", self.step_number, self.total, path)

  def _summarise(self, *, ended: BaseException | None = None, coming: Iterable[int] = ()) -> Path | None:
    """Writes the summary, which the run can do without; None where it is another's task, or cannot be written.

    Args:
      ended: what ended the run before its end.
      coming: steps that will be saved in a moment.
    """
    if jax.process_index() != 0:
      return None
    try:
      return write_summary(self.workdir, alarms=self.health.alarms, ended=ended, coming=coming)
    except Exception as failure:
      reason = failure.strerror or failure if isinstance(failure, OSError) else failure
      log.warning("%s cannot be written: %s", self.workdir / SUMMARY, reason)
      return None

  def _train(self) -> None:
    config = self.run.config
    self.progress = Progress(
      self.total,
      start_step=self.step_number,
      batch_size=config.batch_size,
      every=config.log.every,
      live=None if jax.process_index() == 0 else False,
      goodput=self.goodput,
    )
    self.goodput.begun(self.step_number)
    if self.step_number == 0:
      self._evaluate(0)
    elif not self.evaluated:
      self._evaluate(self.step_number)
      self.checkpoints.evaluated(self.step_number, self.last_metrics, self.records.best)
    batches = prefetch(self.pipeline, self.local, size=config.data.prefetch)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    guard = Guard(config.optim.max_nonfinite, self.state)
    times = SaveTimes(self.run.steps("checkpoint.every"), config.checkpoint.minutes, self.total)
    # "step" is what is not measured inside: the device works while the host keeps its books.
    with contextlib.closing(batches), self.progress, self._steps() as step_fn, self.goodput.measuring("step"):
      if self.step_number < self.total:
        self._make_ready(step_fn, self.pipeline.views)
      try:
        for step in range(self.step_number + 1, self.total + 1):
          with self.interrupts.waiting(), self.progress.waiting(functools.partial(_running, pending)):
            batch, views, data_state = next(batches)
          if step == 1 and config.log.pictures:
            with self.progress.pausing("pictures"):
              self._picture_batch(batch, views)
          self._make_ready(step_fn, views)
          self.interrupts.protect()
          self.state, metrics = step_fn(views, self.state, batch)
          metrics |= self._sizes(views)
          self.step_number, self.data_state = step, data_state
          evaluate = self._due(step, "evaluation.every") and bool(self.run.steps("evaluation.every"))
          self.evaluated = not evaluate
          self.goodput.at(step)
          if pending is not None:
            self._log(*pending)
          pending = (step, metrics)
          if guard.reached(metrics):
            self._log(*pending)
            self._give_up(step, batch, views, data_state)
          self.interrupts.check()
          best = False
          if evaluate:
            pending = self._log(*pending)
            best = self._evaluate(step)
          if times.due(step) or best:
            pending = pending and self._log(*pending)
            self._save()
            times.saved()
            self.interrupts.check()
          self.checkpoints.poll()
      except GivenUp:
        self._stop(pending)
      else:
        if pending is not None:
          self._log(*pending)

  def _stop(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
    """Saves, and ends the run if there is anything left to do."""
    if pending is not None:
      self._log(*pending)
    if self.saved_step != self.step_number:
      self._save()
    with self.goodput.measuring("checkpoint"):
      self.checkpoints.wait()
    if self.step_number == self.total and self.evaluated:
      return
    self.interrupts.saved()
    again = "" if self.evaluated else "; its evaluation was given up, and will be made again"
    log.warning(
      "Stopped at step %d of %d%s; the same command goes on from here.", self.step_number, self.total, again
    )
    raise Stopped(self.interrupts.received, self.step_number)

  def _steps(self) -> CompiledSteps:
    """The training step, for the batches of every resolution that will come."""
    state = abstract_state(self.run)
    left = self.total - self.step_number
    coming = self.pipeline.upcoming(min(left, LOOK_AHEAD))
    if left > LOOK_AHEAD:
      coming += [views for views in self.run.views.variants() if views not in coming]
    batches = {views: abstract_batch(self.run, views) for views in coming}
    make = functools.partial(jitted_step, self.run, state)
    return CompiledSteps(make, state, batches, functools.partial(mesh_context, self.run.mesh))

  def _make_ready(self, steps: CompiledSteps, views: Views) -> None:
    """Compiles ahead, so that the time is reported and does not count as training."""
    if not steps.ready(views):
      with self.interrupts.waiting(), self.progress.pausing("compiling"):
        steps.wait(views)
    if views not in self.programs:
      # A first collective waits only half a minute for processes that still compile: they meet here before it.
      self.programs.add(views)
      processes.meet(f"the training step at {views.name}")
    for compiled, seconds in steps.news():
      name = f"compile_seconds/{compiled.name}" if self._several else "compile_seconds"
      log.info("Compiled the training step%s in %.1f s.", f" at {compiled.name}" if self._several else "", seconds)
      self.writers.timing(self.step_number, {name: seconds})

  @property
  def _several(self) -> bool:
    """Whether the resolution differs from step to step."""
    return len(self.run.views.variants()) > 1

  def _sizes(self, views: Views) -> dict[str, int]:
    """The sizes of a batch's crops, where they differ from step to step."""
    return {f"{kind}_size": size for kind, size in views.sizes.items()} if self._several else {}

  def _due(self, step: int, key: str) -> bool:
    every = self.run.steps(key)
    return step == self.total if not every else step % every == 0 or step == self.total

  def _log(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Fetches the metrics of a step that is over and writes them if it is their turn."""
    every = self.run.config.log.every
    if step % every and step != self.total and step != 1:
      self.progress.step(step, None)
      return
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    self.last_metrics |= values
    self.writers.scalars(step, values)
    self.progress.step(step, values)
    if self.progress.timing:
      self.writers.timing(step, self.progress.timing | self.goodput.timing())
    self._judge(step, values)

  def _judge(self, step: int, values: dict[str, float]) -> None:
    for alarm in self.health.check(step, values):
      if jax.process_index() == 0:  # all know the same
        log.warning("%s", alarm)

  def _give_up(self, step: int, batch: dict[str, jax.Array], views: Views, data_state: dict[str, Any]) -> None:
    """Leaves what makes the step again, and stops."""
    with self.progress.pausing("saving"):
      self.writers.flush()
      variant = self.run.views.variants().index(views)
      folder = dump(self.workdir, step, self.state, batch, variant, data_state, self.run.config)
      with contextlib.suppress(NotWritten):  # it is logged
        self.checkpoints.wait()  # for the step that the message names
    raise UserError(
      f"step {step}: the loss or a gradient was not finite {self.run.config.optim.max_nonfinite} times in a row; those "
      f"updates were skipped. See where it begins, on any machine, with\n  vit-jax replay {folder}\n"
      "and whether a change cures it by adding, for example, --config.model.dtype=float32. "
      + how_to_go_on(self.workdir, self.run.config.schedules.lr.peak)
    )

  def _evaluate(self, step: int) -> bool:
    """Writes scores and pictures of the step's state; whether a score to be kept is the best so far.

    Raises:
      GivenUp: if the run is to stop first.
    """
    if not self.run.steps("evaluation.every"):
      return False
    best, apart, check = False, self.interrupts.apart, self.interrupts.check
    with self.progress.pausing("evaluation"):
      scores = apart(lambda: self.evaluations.scores(self.state, baselines=step == 0, check=check))
      if scores:
        self.writers.scalars(step, scores)
        self.last_metrics |= scores
        self._judge(step, scores)
        log.info("step %d: %s", step, ", ".join(f"{name} {value:.3f}" for name, value in headline(scores).items()))
        best = _of_first(self.records.take(step, scores))
        self.checkpoints.keep_best(self.records.best)
      if self.run.config.log.pictures:
        self.writers.images(step, apart(lambda: self.evaluations.pictures(self.state, check=check)))
      self.evaluated = True
      self._summarise(coming=[step] if best else [])
    return best

  def _picture_batch(self, batch: dict[str, jax.Array], views: Views) -> None:
    local = {
      name: np.concatenate([s.data for s in array.addressable_shards])[:PICTURED] for name, array in batch.items()
    }
    augment, made = self.run.config.augment, jax.device_get(on_one_device(views)(local))
    self.writers.images(0, {"batch": pictures.contact_sheet(views.panels(made), mean=augment.mean, std=augment.std)})

  def _save(self) -> None:
    with self.progress.pausing("saving"):
      self.writers.flush()
      self.checkpoints.save(
        self.step_number,
        self.state.saved(),
        self.data_state,
        configs.to_dict(self.run.config),
        self.last_metrics,
        evaluated=self.evaluated,
        best=self.records.best,
      )
      self.saved_step = self.step_number
