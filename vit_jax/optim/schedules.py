"""Schedules: functions of the step, evaluated inside the training step or, in float64, on the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Linear from `start` to `peak` over `warmup` steps, cosine from `peak` to `end` over `cosine`, then `end`.

  Version 2 (the reference's 7B recipes): the warm-up leaves out its end point, the cosine has both of its ends.
  Version 1 (its ViT-L recipe): the warm-up has its end point, the cosine leaves out its end. `truncate` > 0 (version 1
  only) follows a cosine that is longer by that share and rescales it to reach `end`.

  Attributes:
    start, peak, end: values.
    warmup, cosine: lengths in steps.
    version: 1 or 2.
    truncate: share by which the cosine is cut short.
  """

  start: float
  peak: float
  end: float
  warmup: int
  cosine: int
  version: int = 2
  truncate: float = 0.0

  def __call__(self, step: Any) -> Any:
    """The value at `step`: in float64 for a Python or NumPy integer, in float32 for a JAX one."""
    traced = isinstance(step, jnp.ndarray)
    xp, step = (jnp, step) if traced else (np, np.asarray(step, np.float64))
    rise = self._rise(xp, step)
    fall = self._fall(xp, step - self.warmup)
    return xp.where(step < self.warmup, rise, fall)

  def _rise(self, xp: Any, step: Any) -> Any:
    intervals = max(self.warmup - (1 if self.version == 1 else 0), 1)
    return self.start + (self.peak - self.start) * (step / intervals)

  def _fall(self, xp: Any, step: Any) -> Any:
    if not self.cosine:
      return self.end + xp.zeros_like(step / 1)
    if self.version == 2:
      half = 0.5 * (1 + xp.cos(np.pi * step / max(self.cosine - 1, 1)))
      last = self.cosine
    elif self.truncate:
      points = int((1 + self.truncate) * self.cosine)
      wave = lambda i: 0.5 * (1 + xp.cos(np.pi * i / (points - 1)))  # noqa: E731
      final = 0.5 * (1 + np.cos(np.pi * (self.cosine - 1) / (points - 1)))
      half, last = (wave(step) - final) / (1 - final), self.cosine
    else:
      half, last = 0.5 * (1 + xp.cos(np.pi * step / self.cosine)), self.cosine
    return xp.where(step >= last, self.end, self.end + (self.peak - self.end) * half)


def scale_lr(batch_size: int, rule: str) -> float:
  """The factor that adapts a learning rate to the batch size.

  Args:
    rule: "sqrt_1024": 4 sqrt(batch / 1024); "linear_256": batch / 256; "none": 1.

  Raises:
    ValueError: for another rule.
  """
  rules = {"sqrt_1024": 4 * (batch_size / 1024) ** 0.5, "linear_256": batch_size / 256, "none": 1.0}
  if rule not in rules:
    raise ValueError(f"optim.lr_scaling must be one of {sorted(rules)}, got {rule!r}.")
  return rules[rule]
