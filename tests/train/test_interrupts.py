"""Stopping on request, and the times of saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from vit_jax.train.interrupts import RESUMABLE, Interrupts, Stopped
from vit_jax.train.saving import SaveTimes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_protected_run_ends_after_its_step(number: int, code: int):
  before = signal.getsignal(number)
  with Interrupts() as interrupts:
    interrupts.protect()
    assert not interrupts.due(1)
    os.kill(os.getpid(), number)
    assert interrupts.due(2) and interrupts.received == number
  assert signal.getsignal(number) is before
  assert Stopped(number, 2).code == code


def test_before_there_is_anything_to_save_a_run_ends_at_once(caplog: pytest.LogCaptureFixture):
  with pytest.raises(Stopped) as stopped, Interrupts(40):
    os.kill(os.getpid(), signal.SIGTERM)
  assert stopped.value.code == RESUMABLE and stopped.value.step == 40 and "from step 40" in caplog.text
  with pytest.raises(KeyboardInterrupt), Interrupts():
    os.kill(os.getpid(), signal.SIGINT)


HANGING = """
import os, signal, time
from vit_jax.train.interrupts import Interrupts
with Interrupts(grace=0.2) as interrupts:
  interrupts.protect()
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(300)  # a save that takes too long
"""


def test_the_grace_period_is_kept_even_if_the_save_is_not_done():
  done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=200)
  assert done.returncode == RESUMABLE and "checkpoint.grace=0.2" in done.stderr


class Clock:
  def __init__(self) -> None:
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


def test_saves_come_by_steps_by_minutes_and_at_the_end():
  clock = Clock()
  times = SaveTimes(10, 2.0, total=25, clock=clock)
  due = []
  for step in range(1, 26):
    clock.now += 25.0
    if times.due(step):
      due.append(step)
      times.saved()
  assert due == [5, 10, 15, 20, 25]  # 120 seconds are over with the fifth step of 25; those of step 10 count anew
  by_steps = SaveTimes(10, None, total=25, clock=clock)
  assert [step for step in range(1, 26) if by_steps.due(step)] == [10, 20, 25]
