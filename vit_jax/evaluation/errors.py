"""What can be wrong with an evaluation, for the user to put right."""

from __future__ import annotations


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
