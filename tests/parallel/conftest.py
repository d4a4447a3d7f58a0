"""Jobs whose processes are threads, and what is seen of their end."""

from __future__ import annotations

import contextlib
import threading

import pytest

from tests.parallel.members import free_address, in_parallel, join
from vit_jax.parallel import ending, lifeline


@pytest.fixture
def job():
  """Makes jobs whose processes take their leave when the test is over, lest a later test hear of their end."""
  made = []

  def make(count: int) -> list[lifeline.Lifeline]:
    address = free_address()
    made.extend(in_parallel(*(lambda i=i: join(address, i, count) for i in range(count))))
    return made

  yield make
  for member in made:
    with contextlib.suppress(OSError):
      member.leave()


@pytest.fixture
def ends(monkeypatch):
  """(thread's own process, exit code) of every process that ended, instead of the end of the tests."""
  seen = []

  def end(code):
    seen.append(code)
    raise SystemExit

  monkeypatch.setattr(ending, "end", end)
  monkeypatch.setattr(threading, "excepthook", lambda args: None)
  return seen
