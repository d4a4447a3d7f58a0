"""Jobs of several processes on this machine, for tests: the smallest run that has every part."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vit_jax.train.writers import read_lines

ROOT = Path(__file__).parents[2]
SMALL = {
  "duration": "12 steps",
  "loss_group_size": 2,
  "model.depth": 1,
  "crops.global_size": 16,
  "crops.local_size": 8,
  "crops.local_number": 1,
  "data.source": "embedded:textures?size=32&count=64",
  "checkpoint.every": "1000 steps",
  "evaluation.every": "0 steps",
  "log.pictures": "False",
}


def overrides(**changes: str | int) -> list[str]:
  """The flags that make configs/tiny.py still smaller, with `_` for the dots of a key doubled: mesh__data=2."""
  changed = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
  return [f"--config.{key}={value}" for key, value in changed.items()]


def environment(folder: Path) -> dict[str, str]:
  kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "SLURM_", "OMPI_"))}
  return kept | {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in conftest.py: the same bits
    "PYTHON": sys.executable,  # of launch/local.sh
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "cache")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


class Job:
  """A run of launch/local.sh."""

  def __init__(self, process: subprocess.Popen, log: Path):
    self._process, self._log = process, log

  @property
  def output(self) -> str:
    return self._log.read_text()

  def signal(self, process_id: int, number: int) -> float:
    """Sends a signal to one process of the job; returns the time."""
    for folder in Path("/proc").iterdir():
      try:
        if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) != self._process.pid:
          continue
        variables, words = ((folder / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
      except (OSError, ValueError):
        continue
      if f"JAX_PROCESS_ID={process_id}".encode() in variables and b"vit_jax" in words:
        os.kill(int(folder.name), number)
        return time.monotonic()
    raise AssertionError(f"no process {process_id} of {self._process.pid}")

  def wait(self, seconds: float = 900) -> int:
    return self._process.wait(seconds)

  def wait_until(self, condition, seconds: float = 900) -> None:
    until = time.monotonic() + seconds
    while not condition():
      assert self._process.poll() is None and time.monotonic() < until, self.output
      time.sleep(0.05)


@contextmanager
def started(folder: Path, workdir: Path, processes: int, *flags: str, **variables: str) -> Iterator[Job]:
  """A training job of several processes, which ends with the `with`."""
  log = folder / f"{workdir.name}.log"
  command = ["launch/local.sh", str(processes), "train", "--config=configs/tiny.py", f"--workdir={workdir}", *flags]
  with open(log, "a") as output:
    process = subprocess.Popen(
      command, cwd=ROOT, env=environment(folder) | variables, stdout=output, stderr=output, start_new_session=True
    )
  try:
    yield Job(process, log)
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()


def losses(workdir: Path) -> dict[int, float]:
  return {line["step"]: line["loss"] for line in read_lines(workdir / "metrics.jsonl") if "loss" in line}


_HANGING = """
import os, time
real = os.open
def hanging(path, *args, **options):
  while str(path).endswith(".png") and os.path.exists({flag!r}):
    time.sleep(0.1)
  return real(path, *args, **options)
os.open = hanging
"""


def reads_that_hang(folder: Path) -> tuple[dict[str, str], Path]:
  """What to add to a process's environment, and a file: while it exists, images are not opened, as behind a network."""
  flag, code = folder / "hang", folder / "site"
  code.mkdir()
  (code / "sitecustomize.py").write_text(_HANGING.format(flag=str(flag)))
  return {"PYTHONPATH": f"{code}{os.pathsep}{ROOT}"}, flag
