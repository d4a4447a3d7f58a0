"""The other side of a benchmark that needs PyTorch: a process of its own, asked for one repetition after the other.

In one process the threads of two frameworks would get in each other's way; and PyTorch may live in an environment of
its own. A peer is a script that `torch_peer.py` runs. It reads one JSON line of settings from standard input and says
{"name": ...} when it is ready, or {"missing": why} if it cannot be; then, for every line with a number, it does so many
repetitions and answers {"seconds": [...], "peak_bytes": ...}.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PEER_PYTHON = "VIT_JAX_PEER_PYTHON"  # environment variable: a Python that has PyTorch, if this one has not


class MissingLibrary(RuntimeError):
  """PyTorch is there, but not the library that a benchmark compares with."""


@functools.cache
def peer_python() -> str | None:
  """A Python with PyTorch: this one, or that of the environment variable."""
  return sys.executable if importlib.util.find_spec("torch") else os.environ.get(PEER_PYTHON)


def find_peer(script: str, settings: dict[str, Any]) -> Peer | None:
  """The running peer of a script of this folder, on the same kind of device; None where there is no PyTorch.

  It is compiled on a GPU, unless the settings say otherwise ("compile").

  Raises:
    MissingLibrary: if the script says that its Python lacks what it needs besides PyTorch.
  """
  python = peer_python()
  if python is None:
    return None
  on_gpu = jax.default_backend() == "gpu"
  threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  surroundings = {"device": "cuda" if on_gpu else "cpu", "threads": threads, "compile": on_gpu}
  return Peer(python, script, surroundings | settings)


class Peer:
  """A peer's process; `step` does one repetition."""

  def __init__(self, python: str, script: str, settings: dict[str, Any]):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # A session of its own: Ctrl-C is for this process, which ends it.
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["start_new_session"] = True
    command = [python, str(Path(__file__).with_name("torch_peer.py")), script]
    self._process = subprocess.Popen(command, env=environment, **pipes)
    self._peak: int | None = None
    try:
      answer = self._ask(json.dumps(settings))
    except BaseException:  # also an interrupt, while it makes itself ready
      self._end()
      raise
    if "missing" in answer:
      self.__exit__()
      raise MissingLibrary(answer["missing"])
    self.name = answer["name"]

  def _ask(self, line: str) -> dict[str, Any]:
    self._process.stdin.write(line + "\n")
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError("PyTorch's side of the benchmark ended; what it said is above.")
    return json.loads(answer)

  def step(self) -> None:
    self._peak = self._ask("1")["peak_bytes"]

  def memory(self) -> str:
    """What its tensors took at most on an accelerator, for a note."""
    return "" if self._peak is None else f"; PyTorch {self._peak / 2**30:.2f} GiB"

  def __enter__(self) -> Peer:
    return self

  def __exit__(self, kind: type[BaseException] | None = None, *unused: object) -> None:
    if kind is not None:
      self._end()
      return
    self._process.stdin.close()
    self._process.wait()

  def _end(self) -> None:
    """Ends the process whatever it is at."""
    self._process.kill()
    self._process.wait()
