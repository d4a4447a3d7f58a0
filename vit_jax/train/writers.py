"""Where a run writes what it measures: JSON lines, TensorBoard, PNG pictures, text.

    <workdir>/metrics.jsonl     one JSON object a line: {"step": 120, "loss": 8.53, …}; deterministic values only
    <workdir>/timing.jsonl      the same for everything that depends on the clock (images/s, waiting, memory)
    <workdir>/pictures/*.png    one file per picture and step
    <workdir>/text/*.md         the newest version of each text
    <workdir>/tensorboard/      all of it once more, when tensorboardX is installed

The metrics file is resume-exact: a run that was killed and resumed from step s drops every line beyond s when it
reopens the file, and what it writes next makes the file equal, byte for byte, to that of a run that was never killed.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Writers:
  """All outputs of one run; every method may be called on every process, only an active one writes.

  Args:
    workdir: directory of the run, made if missing.
    tensorboard: also write TensorBoard events (needs tensorboardX; without it one warning says how to get it).
    resume_step: the step of the restored checkpoint (0 for a fresh start): lines with a larger step are removed, and
      values that were already recorded at exactly this step are not written twice. None keeps every complete line.
    active: False writes nothing: for the processes of a multi-host job that are not the first.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    tensorboard: bool = True,
    resume_step: int | None = None,
    active: bool = True,
  ):
    self.workdir = Path(workdir)
    self._active = active
    self._events = None
    if not active:
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._metrics = JsonLines(self.workdir / METRICS, resume_step=resume_step)
    self._timing = JsonLines(self.workdir / "timing.jsonl", resume_step=resume_step)
    if tensorboard:
      self._events = _open_tensorboard(self.workdir / "tensorboard", resume_step)

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Records deterministic values of a step (numbers or arrays of one element)."""
    self._numbers("_metrics", step, values)

  def timing(self, step: int, values: Mapping[str, Any]) -> None:
    """Records values that depend on the clock or the machine; kept out of metrics.jsonl."""
    self._numbers("_timing", step, values)

  def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes pictures, uint8 [H, W, 3] or [H, W], as pictures/NAME_STEP.png."""
    if not self._active:
      return
    for name, picture in images.items():
      picture = np.asarray(picture)
      if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[-1] == 3)):
        raise ValueError(
          f"picture {name!r} is {picture.dtype} {picture.shape}: expected uint8 [height, width, 3] or [height, width]."
        )
      path = self.workdir / "pictures" / f"{_file_name(name)}_{step:07d}.png"
      path.parent.mkdir(exist_ok=True)
      partial = path.with_suffix(".partial")
      Image.fromarray(picture).save(partial, format="PNG")
      os.replace(partial, path)
      if self._events is not None:
        self._events.add_image(name, picture, step, dataformats="HWC" if picture.ndim == 3 else "HW")

  def text(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts (Markdown) as text/NAME.md; the newest version of each stays."""
    if not self._active:
      return
    for name, text in texts.items():
      path = self.workdir / "text" / f"{_file_name(name)}.md"
      path.parent.mkdir(exist_ok=True)
      _write_atomically(path, text.encode())
      if self._events is not None:
        self._events.add_text(name, text, step)

  def flush(self) -> None:
    """Puts everything on the disk. Call it before saving a checkpoint of the same step: then no line that the
    checkpoint has seen can be lost, not even to a power cut."""
    if self._active:
      self._metrics.sync()
      self._timing.sync()
      if self._events is not None:
        self._events.flush()

  def close(self) -> None:
    """Flushes and closes all files; closing twice is allowed."""
    if self._active:
      self.flush()
      self._metrics.close()
      self._timing.close()
      if self._events is not None:
        self._events.close()
      self._active = False

  def __enter__(self) -> Writers:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _numbers(self, file: str, step: int, values: Mapping[str, Any]) -> None:
    if not self._active:
      return
    numbers = getattr(self, file).write(step, values)
    if self._events is not None:
      for name, value in numbers.items():
        self._events.add_scalar(name, value, step)


class JsonLines:
  """A file of one JSON object a line that survives crashes and continues exactly where a checkpoint left it.

  Every line is handed to the operating system at once, so that killing the process loses at most the line being
  written; such a torn line is dropped when the file is reopened. The arguments are those of `Writers`.
  """

  def __init__(self, path: str | os.PathLike, *, resume_step: int | None = None):
    self.path = Path(path)
    self._resume_step = resume_step
    self._recorded = _rewind(self.path, resume_step)
    self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run

  def write(self, step: int, values: Mapping[str, Any]) -> dict[str, int | float]:
    """Appends one line and returns what was written (nothing if all of it was recorded before the run resumed)."""
    step = int(step)
    numbers = {name: _number(name, value) for name, value in values.items()}
    if step == self._resume_step:
      numbers = {name: value for name, value in numbers.items() if name not in self._recorded}
    if numbers:
      line = {"step": step} | {name: _encode(value) for name, value in numbers.items()}
      self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
    return numbers

  def sync(self) -> None:
    """Waits until the lines are on the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def read_lines(path: str | os.PathLike) -> list[dict[str, int | float]]:
  """The lines of a metrics file, with "nan" and "inf" as floats again; a torn last line is left out."""
  path = Path(path)
  if not path.exists():
    return []
  lines = [record for _, record in _parse(path)]
  return [{name: _NON_FINITE.get(value, value) for name, value in line.items()} for line in lines]


def _rewind(path: Path, resume_step: int | None) -> set[str]:
  """Removes torn lines and lines beyond `resume_step`; returns the names recorded at that very step."""
  if not path.exists():
    return set()
  lines = _parse(path)
  if resume_step is not None:
    lines = [(raw, record) for raw, record in lines if record["step"] <= resume_step]
  kept = b"".join(raw for raw, _ in lines)
  if len(kept) != path.stat().st_size:
    _write_atomically(path, kept)
  return {name for _, record in lines if record["step"] == resume_step for name in record}


def _parse(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
  """The readable lines of a file as (raw bytes, record); says which lines it could not read."""
  parsed, torn = [], []
  for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
    try:
      record = json.loads(raw)
      complete = raw.endswith(b"\n") and isinstance(record["step"], int)
    except (ValueError, KeyError, TypeError):
      complete = False
    if complete:
      parsed.append((raw, record))
    else:
      torn.append(number)
  if torn:
    log.warning("%s: leaving out unreadable line(s) %s, torn by a crash.", path, ", ".join(map(str, torn)))
  return parsed


def _number(name: str, value: Any) -> int | float:
  if isinstance(value, int | float) and not isinstance(value, bool):
    return value
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f"metric {name!r} has shape {array.shape}: only single numbers can be written.")
  if array.dtype.kind in "iub":
    return int(array.item())
  if array.dtype.itemsize < 8:
    return float(str(np.float32(array.item())))  # the shortest decimal that is still the same float32
  return float(array.item())


def _encode(value: int | float) -> int | float | str:
  """JSON has no NaN and no infinity: they become strings."""
  return value if math.isfinite(value) else str(float(value))


def _file_name(name: str) -> str:
  return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _write_atomically(path: Path, content: bytes) -> None:
  partial = path.with_name(path.name + ".partial")
  with open(partial, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def _open_tensorboard(directory: Path, resume_step: int | None):
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    log.warning(
      "No TensorBoard files: tensorboardX is not installed. Install it with: pip install 'vit-jax[tensorboard]', "
      "or set log.tensorboard=False. metrics.jsonl holds every value in any case."
    )
    return None
  # Events beyond the restored step are hidden by TensorBoard when it meets the purge mark.
  return SummaryWriter(str(directory), purge_step=None if resume_step is None else resume_step + 1)
