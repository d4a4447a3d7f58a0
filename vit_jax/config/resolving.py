"""Resolving a config against the data: every duration in steps, every automatic value chosen."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

from ml_collections import ConfigDict

from vit_jax.config.durations import exact_steps, resolve_duration
from vit_jax.config.errors import ConfigError
from vit_jax.config.fields import assign, flatten
from vit_jax.config.schema import loss_group_size
from vit_jax.config.students import SECTION, is_own, student_config, student_names

MAX_STEPS = 2**31 - 1  # steps are counted in int32
# Durations besides `duration`; a percentage is of the run.
_DURATIONS = (
  "init.freeze_backbone_steps",
  "gram.load_at",
  "gram.refresh.first",
  "gram.refresh.every",
  "optim.freeze_last_layer",
  "evaluation.every",
  "checkpoint.every",
  "checkpoint.keep_every",
)


def resolve(config: ConfigDict, num_examples: int, devices: int = 1) -> ConfigDict:
  """A copy whose durations read "N steps" and whose group sizes are set: what a run really uses, and saves.

  Args:
    num_examples: images in the training data.
    devices: over which the images of a batch are spread.

  Raises:
    ConfigError: if the run has no step, or more than MAX_STEPS, or a schedule is longer than the run.
  """
  c = config.copy_and_resolve_references()
  sizes = {"batch_size": c.batch_size, "num_examples": num_examples, "epoch_steps": c.epoch_steps}
  total = resolve_duration(c.duration, key="duration", **sizes)
  if not total:
    raise ConfigError(f"duration={config.duration!r}: the run has no step; give at least 1 step")
  if total > MAX_STEPS:
    raise ConfigError(
      f"duration={config.duration!r}: is more than {MAX_STEPS:,} steps of batch_size={c.batch_size}, the most that "
      "are counted"
    )
  c.duration = f"{total} steps"

  def steps(value: str | None, key: str) -> str | None:
    if value is None:
      return None
    return f"{resolve_duration(value, key=key, total_steps=total, **sizes)} steps"

  for key in _DURATIONS:
    section, _, name = key.rpartition(".")
    values = functools.reduce(lambda inner, part: inner[part], section.split("."), c)
    values[name] = steps(values[name], key)
  if c.gram.load_at is not None and int(c.gram.load_at.split()[0]) >= total:
    raise ConfigError(f"gram.load_at={config.gram.load_at!r}: must be before the end of the run of {total} steps")
  for name, schedule in c.schedules.items():
    if not isinstance(schedule, ConfigDict):
      continue
    _resolve_schedule(schedule, f"schedules.{name}", {**sizes, "total_steps": total})
  c.loss_group_size = loss_group_size(config, devices)
  if c.koleo.group_size is None:
    c.koleo.group_size = _koleo_group_size(config, c.loss_group_size)
  for name in student_names(config):
    alone = resolve(student_config(config, name), num_examples, devices)
    for key, value in flatten(alone).items():
      if is_own(key):
        assign(c, f"{SECTION}.{name}.{key}", value)
  return c


def _koleo_group_size(config: ConfigDict, group: int) -> int:
  """Loss groups that are small because there are many devices are no reason for few neighbours: up to 64 images."""
  if config.loss_group_size is not None or config.micro_batches > 1:  # micro-batches: more would need another pass
    return group
  return max(size for size in range(group, max(group, 64) + 1, group) if config.batch_size % size == 0)


def _resolve_schedule(schedule: ConfigDict, key: str, sizes: dict[str, int | None]) -> None:
  """Sets warm-up and cosine of a schedule to steps.

  The end of each is rounded up, not its length: 10 % and 90 % of any run are together the whole run.
  """
  end, rounded, given = Fraction(0), 0, []
  for part in ("warmup", "cosine"):
    if schedule[part] is None:
      continue
    given.append(f"{key}.{part}={schedule[part]!r}")
    end += exact_steps(schedule[part], key=f"{key}.{part}", **sizes)
    if math.ceil(end) > sizes["total_steps"]:
      raise ConfigError(f"{' and '.join(given)}: must not be longer than the run of {sizes['total_steps']} steps")
    schedule[part] = f"{math.ceil(end) - rounded} steps"
    rounded = math.ceil(end)
