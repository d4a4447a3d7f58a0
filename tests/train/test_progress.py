"""Tests of vit_jax/train/progress.py, with a clock of our own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading

import pytest

from vit_jax.train.progress import Progress, duration


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def run(progress, clock, steps, *, train=0.3, wait=0.1):
  for step in steps:
    with progress.waiting():
      clock.now += wait
    clock.now += train
    progress.step(step, {"loss": 9.87654, "lr": 1e-3})


def test_speed_waiting_and_time_left():
  clock = Clock()
  progress = Progress(100, batch_size=64, every=10, clock=clock, stream=io.StringIO())
  run(progress, clock, range(1, 21))
  assert progress.timing["images_per_second"] == pytest.approx(64 / 0.4)
  assert progress.timing["data_wait_share"] == pytest.approx(0.25)
  assert progress.timing["eta_seconds"] == pytest.approx(80 * 0.4)
  assert progress.line() == "step 20/100 (20%)  loss 9.8765  lr 1.00e-03  160 images/s  data wait 25%  ETA 32 s"


def test_waiting_while_the_devices_are_busy_costs_nothing():
  clock = Clock()
  progress = Progress(10, batch_size=64, every=2, clock=clock, stream=io.StringIO())
  for step, busy in ((1, False), (2, True)):
    with progress.waiting(lambda busy=busy: busy):
      clock.now += 1.0
    clock.now += 4.0
    progress.step(step)
  assert progress.timing["data_wait_share"] == pytest.approx(0.1)


def test_the_size_of_the_crops_is_shown_where_it_varies():
  progress = Progress(10, batch_size=8, every=10, clock=Clock(), stream=io.StringIO())
  progress.step(1, {"loss": 2.0, "global_size": 512.0, "local_size": 112.0, "gram_size": 768.0})
  assert progress.line() == "step 1/10 (10%)  512/112/768 px  loss 2.0000"
  progress.step(2, {"loss": 2.0, "global_size": 768.0, "local_size": 112.0})
  assert "768/112 px" in progress.line()


def test_pauses_count_for_the_time_left_but_not_for_the_speed():
  clock = Clock()
  progress = Progress(100, batch_size=64, every=10, clock=clock, stream=io.StringIO())
  run(progress, clock, range(1, 11))
  with progress.pausing("evaluation"):
    clock.now += 10.0
  run(progress, clock, range(11, 21))
  assert progress.timing["images_per_second"] == pytest.approx(160)
  assert progress.timing["pause_seconds"] == pytest.approx(10)
  assert progress.timing["eta_seconds"] == pytest.approx(80 * (0.4 + 10 / 20))


def test_what_comes_once_does_not_count_for_the_time_left():
  clock = Clock()
  progress = Progress(1000, batch_size=64, every=1, clock=clock, stream=io.StringIO())
  for what, seconds in (("evaluation", 30.0), ("compiling", 60.0)):
    with progress.pausing(what):
      clock.now += seconds
  run(progress, clock, [1])
  assert progress.timing["eta_seconds"] == pytest.approx(999 * 0.4)
  with progress.pausing("compiling"):  # another resolution
    clock.now += 60.0
  run(progress, clock, [2])
  assert progress.timing["eta_seconds"] == pytest.approx(998 * 0.4)


def test_a_resumed_run_counts_only_its_own_steps():
  clock = Clock()
  progress = Progress(100, start_step=50, batch_size=8, every=10, clock=clock, stream=io.StringIO())
  run(progress, clock, range(51, 61))
  assert progress.timing["images_per_second"] == pytest.approx(20)
  assert progress.timing["eta_seconds"] == pytest.approx(40 * 0.4)


def test_a_plain_line_every_window_and_at_the_end(caplog):
  clock = Clock()
  with caplog.at_level(logging.INFO):
    run(Progress(25, batch_size=4, every=10, clock=clock, stream=io.StringIO()), clock, range(1, 26))
  assert [r.message.split()[1] for r in caplog.records] == ["10/25", "20/25", "25/25"]


def test_on_a_terminal_one_line_is_kept_and_logs_appear_above_it():
  clock, terminal = Clock(), io.StringIO()
  handler = logging.StreamHandler(sys.stderr)
  logging.getLogger().addHandler(handler)
  before = sys.stderr
  try:
    with Progress(20, batch_size=4, every=10, clock=clock, stream=terminal, live=True) as progress:
      run(progress, clock, range(1, 11))
      logging.getLogger("somebody").warning("a word in between")
      run(progress, clock, range(11, 21))
    assert handler.stream is before and sys.stderr is before
  finally:
    logging.getLogger().removeHandler(handler)
  shown = terminal.getvalue()
  assert "step 20/20 (100%)" in shown and "images/s" in shown


def test_on_a_terminal_the_lines_of_the_log_stay_above_the_live_one(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "80")
  master, slave = os.openpty()
  shown, clock, logger = [], Clock(), logging.getLogger("vit_jax")
  reader = threading.Thread(target=lambda: shown.extend(until_closed(master)))
  reader.start()
  handler = logging.StreamHandler(sys.stderr)
  logging.getLogger().addHandler(handler)
  monkeypatch.setattr(logger, "level", logging.INFO)
  logger.manager._clear_cache()
  try:
    with (
      os.fdopen(slave, "w") as terminal,
      Progress(30, batch_size=40_000, every=10, clock=clock, stream=terminal) as progress,
    ):
      run(progress, clock, range(1, 31))
  finally:
    logging.getLogger().removeHandler(handler)
  reader.join(10)
  # What a terminal keeps: of a line that is begun again and erased, what was written last.
  kept = [line.rsplit("\x1b[2K", 1)[-1] for line in b"".join(shown).decode().split("\r\n")]
  lines = [line for line in kept if line.startswith("step")]
  assert [line.split()[1] for line in lines] == ["10/30", "20/30", "30/30", "30/30"], kept  # the live line, too
  assert all("ETA" in line and len(line) <= 80 for line in lines)


def until_closed(descriptor):
  with contextlib.suppress(OSError):
    while data := os.read(descriptor, 65536):
      yield data


@pytest.mark.parametrize("width", [120, 100, 80, 60, 40, 24])
def test_the_line_fits_its_terminal_and_says_when_the_run_ends_as_long_as_that_fits(width):
  clock = Clock()
  progress = Progress(1_000_000, batch_size=2048, every=10, clock=clock, stream=io.StringIO())
  for step in range(999_000, 999_011):
    clock.now += 12.3
    progress.step(step, {"loss": 19.87654, "lr": 1e-3, "global_size": 512.0, "local_size": 112.0})
  for doing in ("", "evaluation"):
    line = progress.line(width, doing=doing)
    assert len(line) <= max(width, 40)
    assert line.startswith("step 999010/1000000 (100%)")
    assert ("ETA 3 h 22 min" in line) == (width >= 60), line
    assert ("loss 19.8765" in line) == (width >= 80 or (width == 60 and not doing)), line
  assert "images/s" in progress.line(80) and "lr" not in progress.line(80)


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.2, "0 s"), (59, "59 s"), (60, "1 min"), (750, "12 min 30 s"), (12000, "3 h 20 min"), (190000, "2 d 4 h")],
)
def test_durations_are_for_people(seconds, text):
  assert duration(seconds) == text
