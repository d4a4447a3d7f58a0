"""The checkpoints of a run as a table."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping

from vit_jax.checkpoints import FOLDER, Best, Found, survey
from vit_jax.inspect.columns import align

_UNITS = ("B", "kB", "MB", "GB", "TB")


def saved_steps_table(workdir: str | os.PathLike, *, verify: bool = False, width: int | None = None) -> str:
  """Every checkpoint of a run on a line: its state, size, time, what trained it, its loss; and what a run would use.

  Args:
    workdir: the run.
    verify: read every array and compare it with what was saved.
    width: as in `columns.align`.

  Raises:
    NotSaved: if the folder holds no checkpoint of any kind.
  """
  found = survey(workdir, verify=verify)
  whole = [entry for entry in found if entry.state == "whole"]
  best = whole[-1].meta.get("best", {}) if whole else {}
  rows = [("checkpoint", "state", "size", "saved (UTC)", "by", "loss", "")]
  rows += [(entry.path, entry.state, _size(entry.size), *_about(entry), _remark(entry, best)) for entry in found]
  if whole:
    end = f"A run goes on from {whole[-1].path}."
  elif any(entry.state == "damaged" for entry in found):
    end = "None can be read: a run refuses to go on; move the folder away to start from zero on purpose."
  else:
    end = "No step is whole: a run starts from zero."
  checked = "Every array was read and compared." if verify else "Presence was checked; --verify reads every array."
  gone = [
    f"The best by {name} until then, step {record['step']} ({record['value']:.4f}), is not there."
    for name, record in best.items()
    if f"{FOLDER}/{record['step']}" not in {entry.path for entry in whole}
  ]
  notes = align([(note,) for note in (f"{end} {checked}", *gone)], width=width)
  return f"{align(rows, width=width)}\n\n{notes}"


def _remark(entry: Found, best: Mapping[str, Best]) -> str:
  """What is wrong with a checkpoint, or why it is kept."""
  reasons = [
    f"best {name} {record['value']:.4f}"
    for name, record in best.items()
    if entry.path == f"{FOLDER}/{record['step']}" and entry.state == "whole"
  ]
  if entry.meta is not None and not entry.meta.get("evaluated", True):
    reasons.append("to be evaluated when the run goes on")
  return entry.problem or ", ".join(reasons)


def _about(entry: Found) -> tuple[str, str, str]:
  """When, by how many devices and with what loss a step was saved."""
  meta = entry.meta or {}
  time = datetime.datetime.fromtimestamp(meta["saved_at"], datetime.UTC) if "saved_at" in meta else None
  by = f"{_count(meta['devices'], 'device')}, {_count(meta['processes'], 'process')}" if "devices" in meta else ""
  loss = meta.get("metrics", {}).get("loss")
  return f"{time:%Y-%m-%d %H:%M:%S}" if time else "", by, "" if loss is None else f"{loss:.4f}"


def _count(number: int, what: str) -> str:
  plural = f"{what}es" if what.endswith("s") else f"{what}s"
  return f"{number} {what if number == 1 else plural}"


def _size(size: float) -> str:
  unit = 0
  while size >= 1000 and unit < len(_UNITS) - 1:
    size, unit = size / 1000, unit + 1
  return f"{size:.3g} {_UNITS[unit]}"
