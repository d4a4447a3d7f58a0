"""The health watch of a run: one for each model that it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_jax import methods
from vit_jax.train.health import Alarm, Health


class Watch:
  """Judges the metrics of a run, in which those of several students begin with their names.

  Args:
    config: resolved.
    total_steps: length of the run.
  """

  def __init__(self, config: Any, total_steps: int):
    self._models = {
      name: Health(
        total_steps,
        batch_size=alone.batch_size,
        prototypes={head: alone[head].prototypes for head in ("dino", "ibot")},
        mask_probability=alone.ibot.mask_probability,
      )
      for name, alone in methods.each_student(config).items()
    }

  @property
  def alarms(self) -> list[Alarm]:
    """All alarms so far, by step."""
    found = [alarm for name, health in self._models.items() for alarm in _named(health.alarms, name)]
    return sorted(found, key=lambda alarm: alarm.step)

  def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """Judges the metrics of one step and returns the new alarms; see `Health.check`."""
    new = []
    for name, health in self._models.items():
      new += _named(health.check(step, metrics_of(metrics, name, self._models)), name)
    return new


def metrics_of(metrics: Mapping[str, float], student: str, students: Mapping[str, Any]) -> dict[str, float]:
  """The metrics of one student without its name, and those that all of them share."""
  own = {key.removeprefix(f"{student}/"): value for key, value in metrics.items() if key.startswith(f"{student}/")}
  shared = {key: value for key, value in metrics.items() if key.split("/")[0] not in students}
  return shared | own


def _named(alarms: list[Alarm], student: str) -> list[Alarm]:
  if not student:
    return alarms
  return [dataclasses.replace(alarm, message=f"{student}: {alarm.message}") for alarm in alarms]
