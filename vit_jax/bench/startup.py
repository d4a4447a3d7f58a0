"""`vit-jax bench startup`: from launching `vit-jax train` to the first step, with and without compiled programs.

Each repetition is a process of its own, a run of ViT-S/16 on drawn pictures in a new workdir; it is over when the first
step's metrics are in metrics.jsonl. Cold: an empty compilation cache; warm: that of the first run.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from vit_jax.bench.harness import Part, Row, Timing

log = logging.getLogger(__name__)

_CONFIG = "from vit_jax.config import default as get_config\n"
_LIMIT = 1800.0  # seconds after which a run that has made no step has failed
RUN: Mapping[str, str] = {
  "model.name": "dinov3_vits16",
  "batch_size": "8",
  "duration": "1000 steps",
  "data.source": "embedded:textures?size=128&count=64",
  "data.workers": "0",
  "crops.global_size": "112",
  "crops.local_size": "48",
  "dino.prototypes": "4096",
  "ibot.prototypes": "4096",
  "evaluation.every": "0 steps",
  "log.every": "1",
  "log.pictures": "False",
}


class StartFailed(RuntimeError):
  """The run that was to be timed made no step."""


def parts() -> list[Part]:
  """The first start of a config, and those that follow it."""
  starts = _Starts(RUN)
  return [
    Part("cold", "the first start of a config: nothing is compiled", starts.cold),
    Part("warm", "those that follow: all is compiled", starts.warm),
  ]


class _Starts:
  """Starts of one config, whose compiled programs are kept from one to the next."""

  def __init__(self, run: Mapping[str, str]):
    self.run = run
    sizes = f"{run['crops.global_size']}/{run['crops.local_size']} px, batch {run['batch_size']}"
    self.what = f"{run['model.name']}, {sizes}: launch to first step"
    self.folder = tempfile.TemporaryDirectory(prefix="vit_jax_startup_")

  @functools.cached_property
  def first(self) -> float:
    """Seconds of the start that compiles."""
    return start(Path(self.folder.name), "cold", self.run)

  def cold(self, seconds: float) -> Iterator[Row]:
    """One start."""
    yield Row(f"{self.what}, nothing compiled", "start, wall", Timing((self.first,)))

  def warm(self, seconds: float) -> Iterator[Row]:
    """As many starts as `seconds` allow, after the one that compiles, which does not count."""
    log.info("  after a start of %.0f s that compiles", self.first)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
      taken.append(start(Path(self.folder.name), f"warm{len(taken)}", self.run))
      log.info("  start %d: %.1f s", len(taken), taken[-1])
    note = f"{min(taken):.1f} s at best"
    yield Row(f"{self.what}, compiled before", "start, wall", Timing(tuple(taken)), note=note)


def start(folder: Path, workdir: str, run: Mapping[str, str]) -> float:
  """Seconds from the launch of a run to its first step.

  Raises:
    StartFailed: if the run ends before, with what it said last.
  """
  config, output = folder / "config.py", folder / f"{workdir}.log"
  config.write_text(_CONFIG)
  flags = [f"--config.{key}={value}" for key, value in run.items()]
  flags += [f"--config.compilation_cache={folder / 'cache'}", f"--workdir={folder / workdir}"]
  # A cache of the surroundings would be warm already; the memory of an accelerator is shared with this process.
  environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
  environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  command = [sys.executable, "-m", "vit_jax", "train", f"--config={config}", *flags]
  metrics = folder / workdir / "metrics.jsonl"
  begun = time.perf_counter()
  with output.open("w") as log:
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
  try:
    while not (metrics.exists() and metrics.stat().st_size):
      if process.poll() is not None or time.perf_counter() - begun > _LIMIT:
        last = "\n".join(output.read_text().splitlines()[-15:])
        raise StartFailed(f"the run made no step within {time.perf_counter() - begun:.0f} s; it said:\n{last}")
      time.sleep(0.02)
    return time.perf_counter() - begun
  finally:
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)  # it would save itself first, which nobody needs
    process.wait()
