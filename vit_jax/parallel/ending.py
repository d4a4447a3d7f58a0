"""How a process of a job ends before its time, and what it says then."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from typing import NoReturn

from vit_jax.parallel import wire

FAILED = 1  # exit code of the processes that end because another one failed


class JoinError(RuntimeError):
  """The processes of the job did not come together."""


def say(name: str, text: str) -> None:
  """In one write, so that lines of several processes do not mix."""
  shown = wire.printable(text, 2 * wire.TEXT)
  sys.stderr.write("".join(f"vit-jax: {name}: {line}\n" for line in shown.splitlines()))
  sys.stderr.flush()


def end(code: int) -> NoReturn:
  """At once: a regular end would wait for processes that are gone."""
  try:
    sys.stdout.flush()
  finally:
    os._exit(code if code in range(256) else FAILED)


def ranges(numbers: Collection[int]) -> str:
  """{0, 1, 2, 5} as "0-2, 5"."""
  parts: list[list[int]] = []
  for number in sorted(numbers):
    if parts and number == parts[-1][1] + 1:
      parts[-1][1] = number
    else:
      parts.append([number, number])
  return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in parts)
