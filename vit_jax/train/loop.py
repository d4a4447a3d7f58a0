"""The training loop: the only one, whatever the method.

    prepare -> state (fresh or restored) -> for every step: batch, compiled step, and what is due: log, score, save

Metrics are fetched one step late, so that the host never waits for the step it has just started.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax import parallel
from vit_jax.checkpoints import Checkpoints, NotWritten, latest
from vit_jax.config import UserError
from vit_jax.data.device import augmented, one_device
from vit_jax.data.groups import SIZES, batch_shapes
from vit_jax.data.views import Views
from vit_jax.inspect import pictures, tables
from vit_jax.methods import State
from vit_jax.parallel import processes
from vit_jax.train import frozen, setup, starting
from vit_jax.train import goodput as goodputs
from vit_jax.train.alone import alone, check_folder
from vit_jax.train.caching import caching
from vit_jax.train.compiling import CompiledSteps, compiler_options
from vit_jax.train.evaluations import Evaluations
from vit_jax.train.goodput import Goodput
from vit_jax.train.interrupts import Interrupts, Stopped
from vit_jax.train.nonfinite import Guard, dump, how_to_go_on
from vit_jax.train.prefetch import prefetch
from vit_jax.train.progress import Progress
from vit_jax.train.saving import SaveTimes
from vit_jax.train.summary import write_summary
from vit_jax.train.watch import Watch
from vit_jax.train.writers import METRICS, Writers, read_lines

log = logging.getLogger(__name__)

CROPS = ("global", "local", "gram")
Batch = Mapping[str, jax.Array]
PICTURED = 8  # images of the batch that is shown
LOOK_AHEAD = 1000  # steps among which the resolutions are sought that are to be compiled ahead


def describe(config: ConfigDict, workdir: str, *, accept_config_change: bool = False) -> str:
  """What `train` would do, without compiling or writing anything.

  Raises:
    UserError: where `train` would refuse.
  """
  folder = Path(workdir).expanduser().absolute()
  check_folder(folder)
  run = setup.prepare(setup.grouped_as_begun(config, folder))
  setup.check_unchanged(frozen.pin(run, folder).config, folder, accept_change=accept_config_change)
  facts = "\n".join(f"{name:<14}{value}" for name, value in (setup.describe(run) | {"workdir": workdir}).items())
  step = latest(folder)
  if step is not None:
    start = f"goes on from step {step} of the workdir, whatever init_from and gram.source say"
  else:
    start = starting.report(starting.open_sources(run, abstract_state(run)))
  environment = "\n".join(f"{name}={value}" for name, value in processes.environment().items())
  table = tables.config_table(run.config, configs.defaults_of(run.config))
  return "\n\n".join([table, facts, start, *([f"environment\n{environment}"] if environment else [])])


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
    UserError: if another run is in `workdir`, if there can be no such folder, or if the loss is no longer finite.
  """
  folder = Path(workdir).expanduser().absolute()
  with alone(folder), caching(config.compilation_cache, folder):
    return _train(config, folder, Goodput(folder), accept_config_change=accept_config_change)


def _train(config: ConfigDict, folder: Path, goodput: Goodput, *, accept_config_change: bool) -> State:
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
    return _Loop(run, folder, checkpoints, sources, goodput, accept_config_change=accept_config_change).run_to_end()


@contextlib.contextmanager
def mesh_context(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Where steps are traced: the mesh, and what the logical axes of activations mean on it.

  Initialisation and pictures stay outside: their few images do not divide over the axes.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(parallel.ACTIVATION_AXES):
    yield


def abstract_state(run: setup.Run) -> State:
  """The state's shapes, dtypes and shardings; nothing is allocated.

  Raises:
    MeshError: if the mesh leaves parameters whole that it should spread.
  """
  shapes = jax.eval_shape(run.init, jax.random.key(run.config.seed))
  parallel.check_spread(shapes, run.mesh)
  shardings = parallel.state_shardings(shapes, run.mesh, zero=run.config.mesh.zero)
  return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


def abstract_batch(run: setup.Run, views: Views) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes, types and shardings of a batch of one resolution."""
  sharding = parallel.batch_sharding(run.mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
    for name, (shape, kind) in batch_shapes(views, run.config.batch_size).items()
  }


def make_step(run: setup.Run) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """One step of the method: (state, batch) -> (state, metrics). Crops that are not made yet are made first."""
  step = run.method.make_step(run.config)

  def training_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    return step(state, augmented(batch, run.views, run.mesh, parallel.BATCH_AXES))

  return training_step


def jitted_step(run: setup.Run, state: State) -> Any:
  """The training step for `jax.jit`'s stages; the state is donated and keeps the shardings of the abstract `state`.

  It may be traced once for each resolution of the run: more would compile for minutes in the middle of it, unnoticed.
  """
  chex.clear_trace_counter()  # it knows a function by its place: this is another than that of an earlier run
  step = chex.assert_max_traces(make_step(run), n=len(run.views.variants()))
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


class _Loop:
  """One process's part of a run: the state and everything that is written."""

  def __init__(
    self,
    run: setup.Run,
    workdir: Path,
    checkpoints: Checkpoints,
    sources: list[starting.Opened],
    goodput: Goodput,
    *,
    accept_config_change: bool,
  ):
    self.run, self.workdir, self.checkpoints, self.goodput = run, workdir, checkpoints, goodput
    self.total = run.steps("duration")
    self.local = parallel.LocalBatch(parallel.batch_sharding(run.mesh))
    self.pipeline = setup.open_pipeline(run, self.local, bad_records=workdir / bad_records_file())
    self.last_metrics: dict[str, float] = {}  # the last value of each
    self.programs: set[str] = set()  # batches for which a step has run, by their sizes
    self.step_number, self.state = self._start(sources, accept_config_change)
    self.first_step = self.step_number
    teacher = abstract_state(run).frozen
    if teacher is not None:
      self.state = self.state.replace(frozen=frozen.params_on_devices(run, teacher))
    self.health = self._watch()
    self.evaluations = Evaluations(run)

  def _watch(self) -> Watch:
    """The watch over the metrics, told again how the run began."""
    health = Watch(self.run.config, self.total)
    for line in read_lines(self.workdir / METRICS):
      if line["step"] <= self.step_number:
        health.check(int(line["step"]), {name: value for name, value in line.items() if name != "step"})
    return health

  def _start(self, sources: list[starting.Opened], accept_config_change: bool) -> tuple[int, State]:
    if self.checkpoints.latest_step() is None:
      reached = max((line["step"] for line in read_lines(self.workdir / METRICS)), default=0)
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
    self.last_metrics = restored.metrics
    log.info("Going on from step %d of %d.", restored.step, self.total)
    return restored.step, restored.state

  def run_to_end(self) -> State:
    try:
      if self.step_number >= self.total:
        log.info("The run is complete: nothing left to do.")
        return self._finish()
      with Interrupts(self.step_number, grace=self.run.config.checkpoint.grace) as self.interrupts:
        with Writers(
          self.workdir,
          tensorboard=self.run.config.log.tensorboard,
          resume_step=self.step_number,
          active=jax.process_index() == 0,
        ) as self.writers:
          self._train()
        with self.goodput.measuring("checkpoint"):
          self.checkpoints.wait()
      return self._finish()
    finally:
      if self.step_number < self.total:  # stopped, or failed
        self.goodput.write()
      self.pipeline.close()

  def _finish(self) -> State:
    if self.step_number > self.first_step:
      self.goodput.write()
      log.info("%s", goodputs.describe(self.goodput.starts()))
    if jax.process_index() == 0:
      path = write_summary(self.workdir, alarms=self.health.alarms)
      log.info("%d of %d steps are done. Summary: %s", self.step_number, self.total, path)
    return self.state

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
    batches = prefetch(self.pipeline, self.local, size=config.data.prefetch)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    guard = Guard(config.optim.max_nonfinite, self.state)
    times = SaveTimes(self.run.steps("checkpoint.every"), config.checkpoint.minutes, self.total)
    # "step" is what is not measured inside: the device works while the host keeps its books.
    with contextlib.closing(batches), self.progress, self._steps() as step_fn, self.goodput.measuring("step"):
      self._make_ready(step_fn, abstract_batch(self.run, self.pipeline.upcoming(1)[0]))
      for step in range(self.step_number + 1, self.total + 1):
        with self.progress.waiting(functools.partial(_running, pending)):
          batch, data_state = next(batches)
        if step == 1 and config.log.pictures:
          with self.progress.pausing("pictures"):
            self._picture_batch(batch)
        self._make_ready(step_fn, batch)
        self.interrupts.protect()
        self.state, metrics = step_fn(self.state, batch)
        metrics |= self._sizes(batch)
        self.step_number = step
        self.goodput.at(step)
        if pending is not None:
          self._log(*pending)
        pending = (step, metrics)
        if guard.reached(metrics):
          self._log(*pending)
          self._give_up(step, batch, data_state)
        if self._due(step, "evaluation.every"):
          pending = self._log(*pending)
          self._evaluate(step)
        save, stop = times.due(step), self.interrupts.due(step)
        if save or stop:
          pending = pending and self._log(*pending)
          self._save(step, data_state)
          times.saved()
        self.checkpoints.poll()
        if stop and step < self.total:
          self.checkpoints.wait()
          log.warning("Stopped at step %d of %d; the same command goes on from here.", step, self.total)
          raise Stopped(self.interrupts.received, step)
      if pending is not None:
        self._log(*pending)

  def _steps(self) -> CompiledSteps:
    """The training step, for the batches of every resolution that will come."""
    state = abstract_state(self.run)
    step = jitted_step(self.run, state)
    left = self.total - self.step_number
    coming = self.pipeline.upcoming(min(left, LOOK_AHEAD))
    if left > LOOK_AHEAD:
      coming += [views for views in self.run.views.variants() if views not in coming]
    batches = [(views.name, abstract_batch(self.run, views)) for views in coming]
    return CompiledSteps(step, state, batches, functools.partial(mesh_context, self.run.mesh))

  def _make_ready(self, steps: CompiledSteps, batch: dict[str, jax.Array]) -> None:
    """Compiles ahead, so that the time is reported and does not count as training."""
    if not steps.ready(batch):
      with self.progress.pausing("compiling"):
        steps.wait(batch)
    sizes = str(sorted((name, array.shape) for name, array in batch.items()))
    if sizes not in self.programs:
      # A first collective waits only half a minute for processes that still compile: they meet here before it.
      self.programs.add(sizes)
      processes.meet(f"the training step for {sizes}")
    for name, seconds in steps.news():
      several = self.run.views.resolutions
      log.info("Compiled the training step%s in %.1f s.", f" at {name}" if several else "", seconds)
      self.writers.timing(self.step_number, {f"compile_seconds/{name}" if several else "compile_seconds": seconds})

  def _sizes(self, batch: dict[str, jax.Array]) -> dict[str, int]:
    """The sizes of a batch's crops, where they differ from step to step."""
    if not self.run.views.resolutions:
      return {}
    if SIZES in batch:
      return {f"{kind}_size": size for kind, size in zip(CROPS, batch[SIZES].shape[1:], strict=True) if size}
    return {f"{kind}_size": batch[f"{kind}_crops"].shape[-2] for kind in CROPS if f"{kind}_crops" in batch}

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

  def _give_up(self, step: int, batch: dict[str, jax.Array], data_state: dict[str, Any]) -> None:
    """Leaves what makes the step again, and stops."""
    with self.progress.pausing("saving"):
      self.writers.flush()
      folder = dump(self.workdir, step, self.state, batch, data_state, self.run.config)
      with contextlib.suppress(NotWritten):  # it is logged
        self.checkpoints.wait()  # for the step that the message names
    raise UserError(
      f"step {step}: the loss or a gradient was not finite {self.run.config.optim.max_nonfinite} times in a row; those "
      f"updates were skipped. See where it begins, on any machine, with\n  vit-jax replay {folder}\n"
      "and whether a change cures it by adding, for example, --config.model.dtype=float32. "
      + how_to_go_on(self.workdir, self.run.config.schedules.lr.peak)
    )

  def _evaluate(self, step: int) -> None:
    if not self.run.steps("evaluation.every"):
      return
    with self.progress.pausing("evaluation"):
      scores = self.evaluations.scores(self.state, baselines=step == 0)
      if scores:
        self.writers.scalars(step, scores)
        self.last_metrics |= scores
        self._judge(step, scores)
        shown = {n: value for n, value in scores.items() if n.endswith("/top1") and not re.search(r"/k\d+/", n)}
        log.info("step %d: %s", step, ", ".join(f"{name} {value:.3f}" for name, value in shown.items()))
      if self.run.config.log.pictures:
        self.writers.images(step, self.evaluations.pictures(self.state))

  def _picture_batch(self, batch: dict[str, jax.Array]) -> None:
    local = {
      name: np.concatenate([s.data for s in array.addressable_shards])[:PICTURED] for name, array in batch.items()
    }
    augment, crops = self.run.config.augment, jax.device_get(one_device(self.run.views)(local))
    self.writers.images(0, {"batch": pictures.contact_sheet(crops, mean=augment.mean, std=augment.std)})

  def _save(self, step: int, data_state: dict[str, Any]) -> None:
    with self.progress.pausing("saving"):
      self.writers.flush()
      self.checkpoints.save(step, self.state.saved(), data_state, configs.to_dict(self.run.config), self.last_metrics)
