"""What can be wrong with an evaluation, for the user to put right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_LISTED = 10  # names in a message


class EvaluationError(ValueError):
  """The evaluation cannot be done as asked; the message says why and what to change."""


class UnlabelledError(EvaluationError):
  """The data has no labels, or too few classes, to score features with; `what`: why, without the advice."""

  def __init__(self, what: str):
    self.what = what
    super().__init__(
      f"{what}. Put the images of each class into a sub-folder of its own, name a labelled source in "
      'evaluation.train_source (and evaluation.test_source), or turn evaluation off with evaluation.every="0 steps".'
    )


class Incomplete(EvaluationError):
  """Some of what was asked for could not be scored; the rest was.

  Attributes:
    results: the scores there are, as `evaluate` returns them.
    failed: what has none ("linear", "baseline/pixels/linear") -> why.
  """

  def __init__(self, results: Mapping[str, float], failed: Mapping[str, str]):
    self.results, self.failed = dict(results), dict(failed)
    super().__init__("\n".join(reasons(failed)))


def reasons(failed: Mapping[str, str]) -> list[str]:
  """A line for each reason, with all that it kept from being scored."""
  by_reason: dict[str, list[str]] = {}
  for name, why in failed.items():
    by_reason.setdefault(why, []).append(name)
  return [f"not scored: {', '.join(names)}: {why}" for why, names in by_reason.items()]


def listed(names: Iterable[str]) -> str:
  """Names with commas, the first ones where they are many."""
  names = list(names)
  rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
  return ", ".join(names[:_LISTED]) + rest
