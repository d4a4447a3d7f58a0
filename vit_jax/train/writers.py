"""Where a run writes what it measures: JSON lines, TensorBoard, PNG pictures, text.

    <workdir>/metrics.jsonl     one JSON object a line: {"step": 120, "loss": 8.53, …}; deterministic values only
    <workdir>/timing.jsonl      the same for everything that depends on the clock (images/s, waiting, memory)
    <workdir>/pictures/*.png    one file per picture and step
    <workdir>/text/*.md         the newest version of each text
    <workdir>/tensorboard/      all of it once more, when tensorboardX is installed

The metrics file is resume-exact: a run that was killed and resumed from step s drops every line beyond s when it
reopens the file, and what it writes next makes the file equal, byte for byte, to that of a run that was never killed.
A run ends when it cannot write its metrics; without the rest it goes on, and says once what it could not write.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit_jax import files

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
    self._failed: set[str] = set()  # what could not be written, and was said to be
    if not active:
      return
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._metrics = JsonLines(self.workdir / METRICS, resume_step=resume_step)
    self._timing = JsonLines(self.workdir / "timing.jsonl", resume_step=resume_step)
    if tensorboard:
      self._events = _open_tensorboard(self.workdir / "tensorboard", resume_step)

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Records deterministic values of a step (numbers or arrays of one element)."""
    if self._active:
      self._to_tensorboard(step, self._metrics.write(step, values))

  def timing(self, step: int, values: Mapping[str, Any]) -> None:
    """Records values that depend on the clock or the machine; kept out of metrics.jsonl."""
    if self._active:
      with self._optional("timing.jsonl"):
        self._to_tensorboard(step, self._timing.write(step, values))

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
      with self._optional("pictures"):
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, format="PNG")
        path = self.workdir / "pictures" / f"{_file_name(name)}_{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        files.write_bytes(path, encoded.getvalue())
        if self._events is not None:
          self._events.add_image(name, picture, step, dataformats="HWC" if picture.ndim == 3 else "HW")

  def text(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts (Markdown) as text/NAME.md; the newest version of each stays."""
    if not self._active:
      return
    for name, text in texts.items():
      with self._optional("text"):
        path = self.workdir / "text" / f"{_file_name(name)}.md"
        path.parent.mkdir(exist_ok=True)
        files.write_text(path, text)
        if self._events is not None:
          self._events.add_text(name, text, step)

  def flush(self) -> None:
    """Puts everything on the disk. Call it before saving a checkpoint of the same step: then no line that the
    checkpoint has seen can be lost, not even to a power cut."""
    if self._active:
      self._metrics.sync()
      with self._optional("timing.jsonl"):
        self._timing.sync()
        if self._events is not None:
          self._events.flush()

  def close(self) -> None:
    """Flushes and closes all files; closing twice is allowed."""
    if not self._active:
      return
    with contextlib.ExitStack() as stack:  # whatever fails, the others are closed
      stack.callback(setattr, self, "_active", False)
      for file in (self._metrics, self._timing, self._events):
        if file is not None:
          stack.callback(file.close)
      self.flush()

  def __enter__(self) -> Writers:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    try:
      self.close()
    except Exception as error:
      if kind is None:
        raise
      log.warning("The metrics could not be closed: %s", error)  # the error on its way says more

  @contextlib.contextmanager
  def _optional(self, what: str) -> Iterator[None]:
    """Around writing what the run can do without."""
    try:
      yield
    except OSError as error:
      if what not in self._failed:
        self._failed.add(what)
        reason = error.strerror or error
        log.warning("%s: cannot be written (%s); the run goes on without.", self.workdir / what, reason)

  def _to_tensorboard(self, step: int, numbers: Mapping[str, int | float]) -> None:
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
      files.append(self._file.fileno(), json.dumps(line, allow_nan=False).encode() + b"\n")
    return numbers

  def sync(self) -> None:
    """Waits until the lines are on the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def read_lines(path: str | os.PathLike, *, say: bool = True) -> list[dict[str, int | float]]:
  """The lines of a metrics file, with "nan" and "inf" as floats again; a torn last line is left out.

  Args:
    path: the file.
    say: log which other lines cannot be read.

  Raises:
    DamagedFile: if the file as a whole cannot be read.
  """
  try:
    found = _read(Path(path))
  except FileNotFoundError:
    return []
  for problem in found.problems() if say else ():
    log.warning("%s; left out.", problem)
  return [{name: _NON_FINITE.get(value, value) for name, value in line.items()} for _, line in found.good]


def _rewind(path: Path, resume_step: int | None) -> set[str]:
  """Removes torn lines and lines beyond `resume_step`; returns the names recorded at that very step."""
  try:
    found = _read(path)
  except FileNotFoundError:
    return set()
  if found.bad:
    kept_as = path.with_name(f"{path.name}.damaged")
    shutil.copyfile(path, kept_as)
    for problem in found.problems():
      log.warning("%s; left out, and the file as it was kept as %s.", problem, kept_as)
  if found.torn is not None:
    log.warning("%s: torn by a crash, and cut off.", found.torn)
  lines = found.good
  if resume_step is not None:
    lines = [(raw, record) for raw, record in lines if record["step"] <= resume_step]
  kept = b"".join(raw for raw, _ in lines)
  if len(kept) != path.stat().st_size:
    files.write_bytes(path, kept)
  return {name for _, record in lines if record["step"] == resume_step for name in record}


def _read(path: Path) -> files.Lines:
  try:
    return files.read_json_lines(path, _problem)
  except files.DamagedFile as error:
    raise files.DamagedFile(path, error.reason, advice="move it away, and the run begins another") from error


def _problem(record: Any) -> str | None:
  """What is wrong with a line of metrics."""
  if not isinstance(record, dict):
    return "is no object of JSON"
  if type(record.get("step")) is not int:
    return "has no step"
  wrong = [name for name, value in record.items() if not _is_number(value)]
  return f"has no number for {wrong[0]!r}" if wrong else None


def _is_number(value: Any) -> bool:
  if isinstance(value, str):
    return value in _NON_FINITE
  return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


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


def _open_tensorboard(directory: Path, resume_step: int | None):
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    log.warning(
      "No TensorBoard files: tensorboardX is not installed. Install it with: pip install 'vit-jax[tensorboard]', "
      "or set log.tensorboard=False. metrics.jsonl holds every value in any case."
    )
    return None
  try:
    # Events beyond the restored step are hidden by TensorBoard when it meets the purge mark.
    writer = SummaryWriter(str(directory), purge_step=None if resume_step is None else resume_step + 1)
  except OSError as error:
    log.warning("No TensorBoard files: %s cannot be written (%s).", directory, error.strerror or error)
    return None
  # Its thread would die of a full disk, and whoever writes the next events wait for it for ever.
  events = writer.file_writer.event_writer._ev_writer
  said: list[str] = []
  for name in ("write_event", "flush", "close"):
    setattr(events, name, _surviving(getattr(events, name), directory, said))
  return writer


def _surviving(write: Callable[..., Any], directory: Path, said: list[str]) -> Callable[..., Any]:
  """The function, which says once that the disk refuses, and goes on."""

  def call(*args: Any) -> Any:
    try:
      return write(*args)
    except OSError as error:
      if not said:
        said.append(str(error))
        log.warning("%s: cannot be written (%s); the run goes on without.", directory, error.strerror or error)
      return None

  return call
