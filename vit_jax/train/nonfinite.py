"""What happens when losses or gradients are no longer finite: a few steps are skipped, then the run stops and leaves
everything that is needed to make the last of them again.

    <workdir>/nonfinite/<step>/config.json        the resolved config
    <workdir>/nonfinite/<step>/batch.npz          the whole batch of that step
    <workdir>/nonfinite/<step>/checkpoints/       the state before it, its keys included

`vit-jax replay <workdir>/nonfinite/<step>` makes the step again on any machine, without the data, and says where it
went wrong.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax.checkpoints import FOLDER as CHECKPOINTS
from vit_jax.checkpoints import Checkpoints, steps
from vit_jax.methods import State
from vit_jax.parallel import processes

FOLDER = "nonfinite"
BATCH = "batch.npz"
CONFIG = "config.json"
VARIANT = "variant"  # which of the views' variants the batch is of
_COUNTER = "nonfinite"


class Guard:
  """Counts steps in a row whose update was skipped, a step late: the device is kept waiting only in case of need.

  Args:
    limit: so many in a row are too many.
    state: the state that the first step begins with.
  """

  def __init__(self, limit: int, state: State):
    self._limit = limit
    self._before: Mapping[str, Any] = {_COUNTER: _most(state.counters)}

  def reached(self, metrics: Mapping[str, Any]) -> bool:
    """Whether the step with these metrics, which may still be running, is one too many in a row.

    Waits for the step before it, and for this one only if that was one less than too many.
    """
    before, self._before = self._before, metrics
    return _most(before) + 1 >= self._limit and _most(metrics) >= self._limit


def _most(counters: Mapping[str, Any]) -> int:
  """The highest of the counts of all models that are trained; those of several students begin with their names."""
  nested = [value if isinstance(value, Mapping) else {name: value} for name, value in counters.items()]
  flat = [(name, value) for counts in nested for name, value in counts.items()]
  found = [value for name, value in flat if name.rpartition("/")[-1] == _COUNTER]
  return max((int(value) for value in jax.device_get(found)), default=0)


def dump(
  workdir: Path,
  step: int,
  state: State,
  batch: Mapping[str, jax.Array],
  variant: int,
  data_state: dict[str, Any],
  config: ConfigDict,
) -> Path:
  """Writes what makes `step` again, and returns the folder.

  Args:
    state: after the step, which left parameters and moments as they were. A frozen teacher, which a file holds, is
      left out.
    batch: of the step, as global arrays.
    variant: of the method's views, of which the batch is.
  """
  folder = workdir / FOLDER / str(step)
  state = state.saved().replace(step=state.step - 1, counters=_one_less(state.counters))
  arrays = {name: _whole(array) for name, array in batch.items()} | {VARIANT: np.int32(variant)}
  if jax.process_index() == 0:
    shutil.rmtree(folder, ignore_errors=True)  # the run has come to this step before, with another config
    folder.mkdir(parents=True)
    configs.save(config, folder / CONFIG)
    np.savez(folder / BATCH, **arrays)
  processes.meet(f"the folder of step {step}, without what was in it")
  with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(step - 1, state, data_state, configs.to_dict(config), {})
  return folder


def how_to_go_on(workdir: Path, peak: float) -> str:
  """What to add to the run's command: with the same values it would come to the same step again.

  Args:
    workdir: of the run.
    peak: its schedules.lr.peak.
  """
  lower = f"--config.schedules.lr.peak={peak / 2:g}"
  other = "with a lower peak, as here, a lower optim.clip, or in float32"
  again = f"  --accept_config_change {lower}\n"
  saved = steps(workdir)
  if not saved:
    return f"No step was saved: begin again {other}, by adding to the command of the run\n{again}"
  text = f"Then go on from step {saved[-1]}, the last saved, {other}, by adding to the command of the run\n{again}"
  if saved[:-1]:
    text += (
      f"or, if it is no longer sound, begin a new run with the parameters of an earlier step (there is "
      f"{', '.join(map(str, saved[:-1]))}), by adding\n"
      f"  --workdir=OTHER {lower} --config.init_from={workdir / CHECKPOINTS / str(saved[-2])}\n"
    )
  return text


def _one_less(counters: Mapping[str, Any]) -> dict[str, Any]:
  lowered = {}
  for name, value in counters.items():
    if isinstance(value, Mapping):
      lowered[name] = _one_less(value)
    else:
      lowered[name] = jnp.maximum(value - 1, 0) if name == _COUNTER else value
  return lowered


def _whole(array: jax.Array) -> np.ndarray:
  """A global array on every process."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))
