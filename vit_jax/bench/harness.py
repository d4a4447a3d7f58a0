"""How every benchmark is timed and reported.

A row compares us with a peer in one run: one repetition of ours, one of the peer's, and so on in turn, so that what
else happens on the machine meets both. `ratio` is our time over the peer's, of the medians; below 1 we are faster.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

Clock = Callable[[], float]
log = logging.getLogger(__name__)

_SAY_EVERY = 10.0  # seconds between two lines on what is being measured

_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "numpy",
  "pillow",
  "opencv-python-headless",
  "simplejpeg",
  "grain",
  "torch",
  "transformers",
  "timm",
)
_PEERS = ("torchvision",)


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds of every repetition, each of the same work.

  Attributes:
    seconds: of each repetition.
    work: units of work (images, steps) in one repetition.
  """

  seconds: tuple[float, ...]
  work: float = 1.0

  @property
  def median(self) -> float:
    return float(np.median(self.seconds))

  @property
  def spread(self) -> float:
    """Half of the middle half, as a share of the median."""
    low, high = np.quantile(self.seconds, (0.25, 0.75))
    return float(high - low) / 2.0 / self.median


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    name: what is measured.
    unit: what one unit of work is and which clock ran, as in "image, CPU".
    ours: how long it took.
    peer: with what it is compared; None: with nothing.
    theirs: how long that took.
    share: for a row that is a share of time (0 to 1) and no speed.
    note: what a reader must know.
  """

  name: str
  unit: str
  ours: Timing | None = None
  peer: str | None = None
  theirs: Timing | None = None
  share: float | None = None
  note: str = ""

  @property
  def ratio(self) -> float | None:
    """Our time over the peer's for a unit of work."""
    if self.ours is None or self.theirs is None:
      return None
    return (self.ours.median / self.ours.work) / (self.theirs.median / self.theirs.work)

  def figures(self) -> dict[str, Any]:
    """Everything about the row as JSON can hold it."""
    found: dict[str, Any] = {"name": self.name, "unit": self.unit, "peer": self.peer, "ratio": self.ratio}
    for key, timing in (("ours", self.ours), ("theirs", self.theirs)):
      if timing is not None:
        found[key] = {
          "per_second": timing.work / timing.median,
          "median_seconds": timing.median,
          "spread": timing.spread,
          "repetitions": len(timing.seconds),
          "work": timing.work,
        }
    return found | {"share": self.share, "note": self.note}

  def text(self) -> str:
    """Its figures in two or three lines."""
    parts = []
    if self.share is not None:
      parts.append(f"{self.share:.1%}")
    if self.ours is not None:
      parts.append("ours {}/s ±{}".format(*_speed(self.ours)))
    if self.theirs is not None:
      parts.append("{} {}/s ±{}".format(self.peer, *_speed(self.theirs)))
    if self.ratio is not None:
      parts.append(f"ratio {self.ratio:.3f}")
    lines = [f"{self.name} ({self.unit})", f"  {'; '.join(parts)}", f"  {self.note}" if self.note else ""]
    return "\n".join(line for line in lines if line)


@dataclasses.dataclass(frozen=True)
class Part:
  """What can be measured by itself.

  Attributes:
    name: of `--case`.
    what: for people.
    measure: seconds for a row -> the rows, each when it is measured.
  """

  name: str
  what: str
  measure: Callable[[float], Iterator[Row]]


@dataclasses.dataclass(frozen=True)
class Report:
  """The rows of a benchmark and where they were measured."""

  name: str
  machine: dict[str, Any]
  rows: tuple[Row, ...]

  @classmethod
  def of(cls, name: str, rows: Iterable[Row], *, devices: bool = True, load: float | None = None) -> Report:
    """Rows with what this machine is now.

    Args:
      name: of the benchmark.
      rows: measured.
      devices: ask for them; those of a TPU then belong to this process.
      load: of the machine when the first row was begun; None: what it is now.
    """
    load = _load() if load is None else load
    rows = tuple(rows)
    return cls(name, machine(devices=devices) | {"load_at_start": load}, rows)

  def with_rows(self, rows: Iterable[Row]) -> Report:
    """The same machine with other rows."""
    return dataclasses.replace(self, rows=tuple(rows))

  def title(self) -> str:
    """What is measured on what, and what the figures of a row are."""
    m = self.machine
    where = f"{m['cpu']}, {m['cores']} cores" + (f", {m['devices']}" if m["devices"] else "")
    legend = "ratio: our time / the peer's; ±: half of the middle half of the repetitions"
    return f"vit-jax bench {self.name}: {where}, jax {m['versions']['jax']}\n{legend}"

  def write(self, path: str | os.PathLike) -> None:
    """Writes everything as JSON; a file is replaced at once, so that it is never there in part."""
    content = {"benchmark": self.name, "machine": self.machine, "rows": [row.figures() for row in self.rows]}
    text, place = json.dumps(content, indent=2) + "\n", Path(path).expanduser()
    place.parent.mkdir(parents=True, exist_ok=True)
    if not self.replaces(path):
      place.write_text(text, encoding="utf-8")
      return
    place = place.resolve()  # of a link, what it points to
    unfinished = place.with_name(f".{place.name}.{os.getpid()}")
    try:
      unfinished.write_text(text, encoding="utf-8")
      os.replace(unfinished, place)
    finally:
      unfinished.unlink(missing_ok=True)

  @staticmethod
  def replaces(path: str | os.PathLike) -> bool:
    """Whether a path is that of a file, or of nothing yet; devices and pipes are not replaced."""
    place = Path(path).expanduser()
    return place.is_file() or not place.exists()


def _speed(timing: Timing | None) -> tuple[str, str]:
  if timing is None:
    return "", ""
  return f"{timing.work / timing.median:,.4g}", f"{timing.spread:.0%}"


def repeat(
  work: Callable[[], Any], *, seconds: float, units: float = 1.0, clock: Clock = time.perf_counter, least: int = 3
) -> Timing:
  """Times one thing, after one call that does not count."""
  return alternate(work, None, seconds=seconds, units=units, clock=clock, least=least)[0]


def alternate(
  ours: Callable[[], Any],
  theirs: Callable[[], Any] | None,
  *,
  seconds: float,
  units: float = 1.0,
  their_units: float | None = None,
  clock: Clock = time.perf_counter,
  least: int = 3,
) -> tuple[Timing, Timing]:
  """Times two things in turn, after one call of each that does not count.

  Args:
    ours, theirs: one repetition of each.
    seconds: how long to go on, by the wall clock, but for `least` repetitions.
    units: units of work in one repetition of ours, and of theirs unless `their_units` says otherwise.
    clock: `time.process_time` for work that is to be counted per core.
  """
  both = [work for work in (ours, theirs) if work is not None]
  for work in both:
    work()
  taken: tuple[list[float], ...] = tuple([] for _ in both)
  begun = said = time.perf_counter()
  while len(taken[0]) < least or time.perf_counter() < begun + seconds:
    for work, times in zip(both, taken, strict=True):
      start = clock()
      work()
      times.append(clock() - start)
    now = time.perf_counter()
    if now > said + _SAY_EVERY:
      said = now
      whole = max(seconds, (now - begun) / len(taken[0]) * least)
      log.info("  repetition %d, %.0f of about %.0f s", len(taken[0]), now - begun, whole)
  other = Timing(tuple(taken[-1]), units if their_units is None else their_units)
  return Timing(tuple(taken[0]), units), other


def machine(*, devices: bool = True) -> dict[str, Any]:
  """What the figures belong to: processor, versions and, if they are asked for, devices."""
  versions = {}
  for name in (*_PACKAGES, *_PEERS):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  found = jax.devices() if devices else []
  return {
    "cpu": _processor(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "devices": f"{len(found)} x {found[0].device_kind}" if found else None,
    "system": platform.platform(),
    "python": platform.python_version(),
    "versions": versions,
  }


def _load() -> float | None:
  return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _processor() -> str:
  info = Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()
