"""The students of a distillation with several: which keys are a student's own, and the config of one of them.

`distillation.students` names a run file for each. Of that file only the student's own keys count: what it starts from,
model, heads, losses, schedules and optimizer. They are kept in the section `students.NAME`, where overrides reach them
(`--config.students.small.model.drop_path=0.1`). Everything that decides which images, crops, masks and targets there
are is common to all students and comes from the main config: a batch is made once and the teacher answers it once.

Plain functions of configs, so that training methods may use them, too.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

SECTION = "students"

_OWN = re.compile(r"(init|model|dino|ibot|koleo|gram|schedules|optim)\..+|init_from")
# Of those sections: what decides the masks, the teacher's targets, and when the run stops.
_COMMON = re.compile(
  r"(dino|ibot)\.(prototypes|centering|center_momentum)|ibot\.mask_.+|schedules\.teacher_temperature\..+"
  r"|optim\.max_nonfinite"
)
_ENTRY = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)")


def is_own(key: str) -> bool:
  """Whether a key of the schema is each student's own."""
  return _OWN.fullmatch(key) is not None and _COMMON.fullmatch(key) is None


def split_key(key: str) -> tuple[str | None, str]:
  """("small", "model.width") of "students.small.model.width"; (None, key) of a key of the schema."""
  section, _, rest = key.partition(".")
  name, dot, inner = rest.partition(".")
  return (name, inner) if section == SECTION and dot else (None, key)


def split_entry(entry: str) -> tuple[str, str] | None:
  """Name and run file of an element of `distillation.students`; None if it is not "name=file.py[:arg]"."""
  match = _ENTRY.fullmatch(entry)
  return (match[1], match[2]) if match and PurePath(match[2].partition(".py")[0]).name else None


def student_names(config: ConfigDict) -> tuple[str, ...]:
  """The names of the students in the order of the config; none for a run that trains a single model."""
  entries = [split_entry(entry) for entry in config.distillation.students]
  return tuple(entry[0] for entry in entries if entry)


def student_config(config: ConfigDict, name: str) -> ConfigDict:
  """The config with which the student `name` would be distilled alone: the main one with the student's own keys.

  Raises:
    KeyError: if there is no such student.
  """
  alone = config.copy_and_resolve_references()
  own = alone[SECTION][name]
  with alone.unlocked():
    alone.distillation.students = ()
    alone[SECTION] = ConfigDict()
    alone.update(own)
  return alone


def each_student(config: ConfigDict) -> dict[str, ConfigDict]:
  """The config of every model that a run trains by its name; a run that trains a single one calls it ""."""
  names = student_names(config)
  return {name: student_config(config, name) for name in names} if names else {"": config}


def config_at(config: ConfigDict, address: Any) -> ConfigDict:
  """The config of the model at an address in a run (`checkpoints.Address`), of the config that the run saved.

  Raises:
    ValueError: if the run has no such student, or several and the address names none; says which addresses there are.
  """
  students = each_student(config)
  if (address.student or "") not in students:
    there = " or ".join(str(address._replace(student=name or None)) for name in students)
    raise ValueError(f"that run trained {'several students' if config.students else 'one model'}: give {there}")
  return students[address.student or ""]
