"""How every benchmark is timed and reported.

A row compares us with a peer in one run: one repetition of ours, one of the peer's, and so on in turn, so that what
else happens on the machine meets both. `ratio` is our time over the peer's, of the medians; below 1 we are faster.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
from rich.table import Table

Clock = Callable[[], float]

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


@dataclasses.dataclass(frozen=True)
class Report:
  """The rows of a benchmark and where they were measured."""

  name: str
  machine: dict[str, Any]
  rows: tuple[Row, ...]

  @classmethod
  def of(cls, name: str, rows: Iterable[Row]) -> Report:
    load = _load()
    rows = tuple(rows)  # before the devices are asked for: those of a TPU belong to one process
    return cls(name, machine() | {"load_at_start": load}, rows)

  def show(self) -> None:
    """Prints the table."""
    rich.print(self.table())

  def table(self) -> Table:
    """One line a row: speed, spread, the peer's, and our time over the peer's."""
    m = self.machine
    title = f"vit-jax bench {self.name}: {m['cpu']}, {m['cores']} cores, {m['devices']}, jax {m['versions']['jax']}"
    table = Table(title=title, caption="ratio: our time / the peer's; ±: half of the middle half of the repetitions")
    for column in ("measured", "unit", "ours/s", "±", "peer", "theirs/s", "±", "ratio", "note"):
      table.add_column(column, justify="right" if column in ("ours/s", "±", "theirs/s", "ratio") else "left")
    for row in self.rows:
      ours = _speed(row.ours) if row.share is None else (f"{row.share:.1%}", "")
      ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
      table.add_row(row.name, row.unit, *ours, row.peer or "", *_speed(row.theirs), ratio, row.note)
    return table

  def write(self, path: str | os.PathLike) -> None:
    """Writes everything as JSON."""
    content = {"benchmark": self.name, "machine": self.machine, "rows": [row.figures() for row in self.rows]}
    Path(path).expanduser().write_text(json.dumps(content, indent=2) + "\n")


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
  end = time.perf_counter() + seconds
  while len(taken[0]) < least or time.perf_counter() < end:
    for work, times in zip(both, taken, strict=True):
      start = clock()
      work()
      times.append(clock() - start)
  other = Timing(tuple(taken[-1]), units if their_units is None else their_units)
  return Timing(tuple(taken[0]), units), other


def machine() -> dict[str, Any]:
  """What the figures belong to: processor, devices and versions."""
  versions = {}
  for name in (*_PACKAGES, *_PEERS):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  devices = jax.devices()
  return {
    "cpu": _processor(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
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
