"""Addresses of trained models: a run, one of its steps, one of the students of either.

    runs/x                          the newest step
    runs/x/checkpoints/500          that step
    runs/x/students/small           one of several students, newest step
    runs/x/checkpoints/500/students/small

Student folders need not exist: a step holds all students.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from vit_jax.checkpoints.reading import FOLDER, is_step, latest

STUDENTS = "students"


class Address(NamedTuple):
  """A model in a run.

  Attributes:
    workdir: the run.
    step: the step; None: the newest.
    student: the student's name where a run has several.
  """

  workdir: pathlib.Path
  step: int | None
  student: str | None

  @property
  def place(self) -> tuple[str, ...]:
    """Names that lead to the averaged parameters of the model in a saved state."""
    return ("teacher",) if self.student is None else ("teacher", self.student)

  def pinned(self) -> Address:
    """The same model at the step that is the newest now."""
    return self._replace(step=latest(self.workdir) if self.step is None else self.step)

  def __str__(self) -> str:
    path = self.workdir if self.step is None else self.workdir / FOLDER / str(self.step)
    return str(path if self.student is None else path / STUDENTS / self.student)


def find(path: str | pathlib.Path) -> Address | None:
  """The address that a path is; None where no run is (whether it has that step or student is not looked at)."""
  path, student = pathlib.Path(path), None
  if path.parent.name == STUDENTS:
    path, student = path.parent.parent, path.name
  if (path / FOLDER).is_dir():
    return Address(path, None, student)
  if is_step(path.name) and path.parent.name == FOLDER and path.parent.is_dir() and not _is_of_torch(path):
    return Address(path.parent.parent, int(path.name), student)
  return None


def _is_of_torch(path: pathlib.Path) -> bool:
  """Whether a step was saved by torch.distributed.checkpoint, in a folder that others name as we do."""
  return (path / ".metadata").exists()
