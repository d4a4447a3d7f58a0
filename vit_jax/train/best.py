"""The best steps of a run, by the scores of its evaluations: their checkpoints are kept, whatever their age."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

from vit_jax import methods
from vit_jax.checkpoints import Best
from vit_jax.config import ConfigError
from vit_jax.train.setup import Run

log = logging.getLogger(__name__)


class Records:
  """Where each score that counts was best so far.

  An untrained model, step 0, holds no record: there is no checkpoint of it. Of equal scores the first counts.

  Args:
    names: of the scores.
    mode: "max" or "min": what is better.

  Attributes:
    best: the records by the name of the score.
  """

  def __init__(self, names: Sequence[str], mode: str = "max"):
    self._names, self._sign = tuple(names), {"max": 1.0, "min": -1.0}[mode]
    self.best: dict[str, Best] = {}

  @classmethod
  def of(cls, run: Run) -> Records:
    """Those that `checkpoint.keep_best` asks for."""
    wanted, students = run.config.checkpoint.keep_best, tuple(methods.each_student(run.config))
    if wanted == "off":
      return cls(())
    if run.evaluation_sources is None:
      if wanted is not None:
        log.warning("checkpoint.keep_best=%r: no step is kept for it, as nothing is evaluated.", wanted)
      return cls(())
    wanted = wanted or f"{run.config.evaluation.tasks[0]}/top1"
    if wanted.split("/")[0] in students:
      names = [wanted]
    else:
      names = [f"{student}/{wanted}" if student else wanted for student in students]
    return cls(names, run.config.checkpoint.keep_best_mode)

  def take(self, step: int, scores: Mapping[str, float]) -> bool:
    """Takes note of the scores of a step; whether any is a record.

    Raises:
      ConfigError: if the scores have none of such a name.
    """
    absent = [name for name in self._names if name not in scores]
    if absent:
      there = ", ".join(name for name in scores if not name.startswith("baseline/"))
      raise ConfigError(f"checkpoint.keep_best={absent[0]!r}: an evaluation gives no such score; it gives {there}")
    return any([self._better(name, step, scores[name]) for name in self._names])

  def go_on(
    self, saved: Mapping[str, Best], lines: Iterable[Mapping[str, float]], steps: Sequence[int], step: int
  ) -> None:
    """Takes up the records of the run until now.

    Args:
      saved: the records that the checkpoint of `step` holds; those of other scores do not count.
      lines: of the metrics, for a run that kept no records, or of other scores.
      steps: those that are saved: what is not there any more holds no record.
      step: with which the run goes on.
    """
    self.best = {name: Best(**found) for name, found in saved.items() if name in self._names and found["step"] in steps}
    for line in lines:
      if line["step"] in steps and line["step"] <= step:
        for name in self._names:
          if name in line and name not in saved:
            self._better(name, int(line["step"]), line[name])

  def _better(self, name: str, step: int, value: float) -> bool:
    before = self.best.get(name)
    if step == 0 or math.isnan(value):
      return False
    if before is not None and (step == before["step"] or self._sign * value <= self._sign * before["value"]):
      return False
    self.best[name] = Best(step=step, value=value)
    return True
