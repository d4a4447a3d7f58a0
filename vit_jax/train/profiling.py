"""The real step of a config, a few times under JAX's profiler."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import parallel
from vit_jax.data.views import Views
from vit_jax.inspect.hlo import Program
from vit_jax.inspect.profile import Profile, seconds_by_part
from vit_jax.methods import State
from vit_jax.train import frozen, setup
from vit_jax.train.loop import abstract_state, fresh_state, jitted_step, mesh_context
from vit_jax.train.prefetch import prefetch

log = logging.getLogger(__name__)

FOLDER = "profile"  # in the workdir
_WARM_UP = 2  # steps that nothing is measured of


def profile(config: ConfigDict, workdir: str, *, steps: int) -> tuple[Profile, Path]:
  """Makes the first steps of a run, from fresh parameters: `steps` timed, then as many traced.

  Nothing of a run that the workdir may hold is read or changed.

  Returns:
    What was found, and the folder of the trace.

  Raises:
    ConfigError: if the config cannot work.
    ProfileError: if the trace cannot be read back.
  """
  folder = Path(workdir).expanduser().absolute() / FOLDER / time.strftime("%Y-%m-%d_%H-%M-%S")
  run = setup.prepare(config)
  local = parallel.LocalBatch(parallel.batch_sharding(run.mesh))
  with setup.open_pipeline(run, local) as pipeline:
    batches = prefetch(pipeline, local, size=config.data.prefetch)
    with contextlib.closing(batches):
      stepper = Steps(run, batches)
      stepper.make(_WARM_UP)
      seconds, waiting = stepper.make(steps)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # its events are many, and none is of a device
      with jax.profiler.trace(str(folder), profiler_options=options):
        traced, _ = stepper.make(steps)
  parts = seconds_by_part(folder, stepper.programs(), steps)
  return Profile(parts, step=seconds, traced=traced, waiting=waiting), folder


class Steps:
  """A run's steps one after the other, compiled when a batch of another resolution comes."""

  def __init__(self, run: setup.Run, batches: Iterator[Any]):
    self.run, self.batches = run, batches
    self.abstract = abstract_state(run)
    self.state: State = fresh_state(run)
    if self.abstract.frozen is not None:
      self.state = self.state.replace(frozen=frozen.params_on_devices(run, self.abstract.frozen))
    self.compiled: dict[Views, Any] = {}

  def make(self, number: int) -> tuple[float, float]:
    """(seconds from step to step, seconds of it that a batch was waited for); compiling counts as neither."""
    waited = compiling = 0.0
    metrics, began = None, time.perf_counter()
    for step in range(number):
      start = time.perf_counter()
      batch, views, _ = next(self.batches)
      waited += time.perf_counter() - start
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        call, seconds = self._compiled(views, batch)
        previous, (self.state, metrics) = metrics, call(self.state, batch)
        jax.block_until_ready(previous)  # as the loop, which reads metrics a step late
      compiling += seconds
    jax.block_until_ready(metrics)
    return (time.perf_counter() - began - compiling) / number, waited / number

  def _compiled(self, views: Views, batch: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    if views not in self.compiled:
      log.info("Compiling the step.")
      with mesh_context(self.run.mesh):
        self.compiled[views] = jitted_step(self.run, self.abstract, views).lower(self.abstract, batch).compile()
    return self.compiled[views], time.perf_counter() - start

  def programs(self) -> list[Program]:
    """What ran."""
    return [Program(step.as_text()) for step in self.compiled.values()]
