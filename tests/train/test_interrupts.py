"""Stopping on request, and the times of saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from vit_jax.train.interrupts import RESUMABLE, GivenUp, Interrupts, Stopped
from vit_jax.train.saving import SaveTimes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_protected_run_ends_after_its_step(number: int, code: int):
  before = signal.getsignal(number)
  with Interrupts() as interrupts:
    interrupts.protect()
    interrupts.check()
    os.kill(os.getpid(), number)
    assert interrupts.due() and interrupts.received == number
    with pytest.raises(GivenUp):
      interrupts.check()
  assert signal.getsignal(number) is before
  assert Stopped(number, 2).code == code


def test_before_there_is_anything_to_save_a_run_ends_at_once(caplog: pytest.LogCaptureFixture):
  with pytest.raises(Stopped) as stopped, Interrupts(40):
    os.kill(os.getpid(), signal.SIGTERM)
  assert stopped.value.code == RESUMABLE and stopped.value.step == 40 and "from step 40" in caplog.text
  with pytest.raises(KeyboardInterrupt), Interrupts():
    os.kill(os.getpid(), signal.SIGINT)


def later(number: int = signal.SIGTERM, seconds: float = 0.2) -> None:
  timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
  timer.start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_wait_ends_with_the_signal_and_is_not_begun_after_it(number: int):
  with Interrupts() as interrupts:
    interrupts.protect()
    later(number)
    with pytest.raises(GivenUp), interrupts.waiting():
      threading.Event().wait(60)
    with pytest.raises(GivenUp), interrupts.waiting():
      pytest.fail("was begun")
    os.kill(os.getpid(), signal.SIGTERM)  # while the state is being saved: it is heard already
    interrupts.saved()


def test_work_apart_is_left_behind_and_ends_at_its_next_check():
  ended, go_on = threading.Event(), threading.Event()

  def work(interrupts: Interrupts) -> None:
    try:
      go_on.wait(60)  # a library that does not know of signals
      interrupts.check()
    finally:
      ended.set()

  with Interrupts() as interrupts:
    interrupts.protect()
    assert interrupts.apart(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
      interrupts.apart(lambda: 1 / 0)
    later()
    with pytest.raises(GivenUp):
      interrupts.apart(lambda: work(interrupts))
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(10)


def test_what_is_given_up_is_no_failure_of_what_was_done():
  assert not issubclass(GivenUp, Exception)


UNINTERRUPTIBLE = """
import hashlib, os, signal, threading
from vit_jax.train.interrupts import Interrupts, own_process
own_process()
with Interrupts(7):
  threading.Timer(0.2, os.kill, (os.getpid(), signal.{name})).start()
  hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as a compilation: no signal is handled before it returns
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", RESUMABLE), ("SIGINT", 130)])
def test_a_process_that_cannot_be_interrupted_ends_when_there_is_nothing_to_save(name: str, code: int):
  program = UNINTERRUPTIBLE.format(name=name)
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
  assert done.returncode == code and "nothing new to save" in done.stderr and "from step 7" in done.stderr


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


def test_a_stop_whose_exception_was_lost_is_raised_at_the_next_wait():
  """Python drops what a handler raises while it tidies up, in a weak reference's callback for one."""
  with Interrupts(3) as interrupts:
    with pytest.raises(Stopped):
      os.kill(os.getpid(), signal.SIGTERM)
      threading.Event().wait(5)
    with pytest.raises(Stopped), interrupts.waiting():
      pass
