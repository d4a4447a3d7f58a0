"""Where the time of a run goes, over all its restarts: the share that trained it is its goodput.

    <workdir>/goodput.json    one entry for each start of the run: its steps, and the seconds of every part

The parts of a start add up to the time from the call of `train` to its end (or, of one that was killed, to its last
record, at most `_PERIOD` seconds and one step before). The time between two starts belongs to none of them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from vit_jax import files

log = logging.getLogger(__name__)

FILE = "goodput.json"
PARTS = {
  "init": "opening the data, making the state",
  "compile": "compiling the training step",
  "restore": "reading a checkpoint",
  "data_wait": "waiting for a batch, the devices idle",
  "step": "training",
  "evaluation": "scores and pictures",
  "checkpoint": "saving",
  "idle": "everything else",
}
_PERIOD = 10.0  # seconds between records


class Goodput:
  """A clock for each part of a run. Parts nest: the time of an inner one is not time of the outer.

      goodput = Goodput(workdir)             # what is not measured is "init" …
      with goodput.measuring("restore"):
        ...
      goodput.begun(0)                       # … until the first step, and "idle" after it

  Args:
    workdir: of the run, whose earlier starts are read.
    clock: seconds, monotonic; for tests.
  """

  def __init__(self, workdir: Path, *, clock: Callable[[], float] = time.perf_counter):
    self._path, self._clock = workdir / FILE, clock
    self._earlier = read(workdir)
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._open: list[str] = ["init"]
    self._since = self._written = clock()
    self._began = time.time()
    self._refused = False  # it could not be written, which was said
    self._first: int | None = None
    self._last: int | None = None

  @contextlib.contextmanager
  def measuring(self, part: str) -> Iterator[None]:
    """Time inside belongs to `part`, one of `PARTS`."""
    self._switch()
    self._open.append(part)
    try:
      yield
    finally:
      self._switch()
      self._open.pop()

  def spent(self, part: str, seconds: float) -> None:
    """Says afterwards that the last so many seconds, of the part that is being measured, belong to `part`."""
    self._seconds[part] += seconds
    self._seconds[self._open[-1]] -= seconds

  def begun(self, step: int) -> None:
    """The loop begins, after so many steps."""
    self._switch()
    self._open[0] = "idle"
    self._first = self._last = step
    self.write()

  def at(self, step: int) -> None:
    """Says how many steps are done, and records it now and then."""
    self._last = step
    if self._clock() - self._written >= _PERIOD:
      self.write()

  def starts(self) -> list[dict[str, Any]]:
    """Every start of the run so far, this one last: "began" (Unix time), "first" and "last" step, "seconds" by part."""
    self._switch()
    own = {"began": self._began, "first": self._first, "last": self._last, "seconds": dict(self._seconds)}
    return [*self._earlier, own]

  def timing(self) -> dict[str, float]:
    """For `Writers.timing`: seconds of every part over all starts, and the share that trained."""
    total = totals(self.starts())
    return {f"goodput/{part}_seconds": seconds for part, seconds in total.items()} | {"goodput": share(self.starts())}

  def write(self) -> None:
    """Records this start in the workdir, in the place of its record before; of several processes the first does.

    A disk that refuses is said once: the run can do without, and mostly ends for a reason that matters more.
    """
    self._written = self._clock()
    if jax.process_index() != 0:
      return
    try:
      files.write_json(self._path, self.starts(), indent=1)
    except OSError as error:
      if not self._refused:
        self._refused = True
        log.warning("%s: cannot be written (%s).", self._path, error.strerror or error)

  def _switch(self) -> None:
    now = self._clock()
    self._seconds[self._open[-1]] += now - self._since
    self._since = now


def read(workdir: Path) -> list[dict[str, Any]]:
  """The starts that a workdir has on record; none if there is no record, or one that cannot be read."""
  path = workdir / FILE
  try:
    starts = files.read_json(path, kind=list)
    if not all(map(_is_start, starts)):
      raise files.DamagedFile(path, "is no record of the starts of a run")
  except FileNotFoundError:
    return []
  except files.DamagedFile as error:
    log.warning("%s: the time of earlier starts cannot be read, and is not counted.", error)
    return []
  return starts


def _is_start(entry: Any) -> bool:
  """Whether this is one of `Goodput.starts`."""
  if not isinstance(entry, dict) or not isinstance(entry.get("seconds"), dict):
    return False
  numbers = [entry.get("began"), *entry["seconds"].values(), entry["seconds"].get("step")]
  return all(type(value) in (int, float) for value in numbers) and all(
    entry.get(name, "") is None or type(entry.get(name)) is int for name in ("first", "last")
  )


def totals(starts: list[dict[str, Any]]) -> dict[str, float]:
  """Seconds of every part over all starts, and as "repeated" those of "step" whose steps a later start made again."""
  total = {part: sum(start["seconds"].get(part, 0.0) for start in starts) for part in PARTS}
  repeated = 0.0
  for start, following in zip(starts[:-1], starts[1:], strict=True):
    if start["last"] is not None and following["first"] is not None:
      done, lost = start["last"] - start["first"], start["last"] - max(following["first"], start["first"])
      repeated += start["seconds"]["step"] * max(lost, 0) / done if done else 0.0
  total["step"] -= repeated
  return total | {"repeated": repeated}


def share(starts: list[dict[str, Any]]) -> float:
  """The part of all time in which steps were trained that counted."""
  total = totals(starts)
  return total["step"] / max(sum(total.values()), 1e-9)


def describe(starts: list[dict[str, Any]]) -> str:
  """One line for the log."""
  total = totals(starts)
  whole = max(sum(total.values()), 1e-9)
  parts = [f"{part.replace('_', ' ')} {seconds / whole:.0%}" for part, seconds in total.items() if seconds > 0]
  return f"Goodput {share(starts):.0%} of {whole:.0f} s in {len(starts)} start(s): {', '.join(parts)}."


def table(starts: list[dict[str, Any]]) -> str:
  """The section of the summary page; empty without a record."""
  if not starts:
    return ""
  total = totals(starts)
  whole = max(sum(total.values()), 1e-9)
  words = PARTS | {"repeated": "steps that a later start made again"}
  rows = [
    f"| {part.replace('_', ' ')} | {words[part]} | {seconds:.1f} | {seconds / whole:.1%} |"
    for part, seconds in total.items()
    if seconds or part != "repeated"
  ]
  head = f"{share(starts):.1%} of {whole:.0f} s, over {len(starts)} start(s), trained the model."
  return "\n".join(["## Goodput", "", head, "", "| part | | seconds | share |", "|---|---|---|---|", *rows])
