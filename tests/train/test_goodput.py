"""Where the time of a run went, over its restarts."""

from __future__ import annotations

import json

import pytest

from vit_jax.train.goodput import FILE, PARTS, Goodput, describe, read, share, table, totals


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def start(workdir, *, first, last, step_seconds, killed=False):
  """A start of a run: 5 s of init, 2 s of restore, then steps with 1 s of waiting in all, and 3 s of saving."""
  clock = Clock()
  goodput = Goodput(workdir, clock=clock)
  clock.now += 5
  with goodput.measuring("restore"):
    clock.now += 2
  goodput.begun(first)
  with goodput.measuring("step"):
    clock.now += 1
    goodput.spent("data_wait", 1)
    for step in range(first + 1, last + 1):
      clock.now += step_seconds
      goodput.at(step)
    if killed:
      return goodput
    with goodput.measuring("checkpoint"):
      clock.now += 3
  clock.now += 1
  goodput.write()
  return goodput


def test_parts_nest_and_add_up(tmp_path):
  goodput = start(tmp_path, first=0, last=4, step_seconds=10)
  (only,) = read(tmp_path)
  expected = dict.fromkeys(PARTS, 0.0)
  expected |= {"init": 5, "restore": 2, "data_wait": 1, "step": 40, "checkpoint": 3, "idle": 1}
  assert only["seconds"] == expected and (only["first"], only["last"]) == (0, 4)
  assert share(read(tmp_path)) == pytest.approx(40 / 52)
  assert goodput.timing()["goodput/step_seconds"] == 40 and goodput.timing()["goodput"] == pytest.approx(40 / 52)


def test_restarts_add_up_and_steps_made_again_do_not_count(tmp_path):
  start(tmp_path, first=0, last=4, step_seconds=10, killed=True)  # recorded at every step: they take 10 s
  start(tmp_path, first=2, last=6, step_seconds=10)
  starts = read(tmp_path)
  assert len(starts) == 2
  total = totals(starts)
  assert total["init"] == 10 and total["restore"] == 4
  assert (total["step"], total["repeated"]) == (60, 20)
  assert share(starts) == pytest.approx(60 / sum(total.values()))
  assert "in 2 start(s)" in describe(starts) and "repeated" in describe(starts)
  assert "| repeated | steps that a later start made again | 20.0 |" in table(starts)


def test_a_start_that_was_killed_early_is_on_record(tmp_path):
  clock = Clock()
  goodput = Goodput(tmp_path, clock=clock)
  clock.now += 7
  goodput.begun(0)
  clock.now += 3
  goodput.at(1)  # within the period: not written again
  assert read(tmp_path)[0]["seconds"]["init"] == 7 and read(tmp_path)[0]["last"] == 0


@pytest.mark.parametrize(
  "content", ["{", "", "{}", "[1]", '[{"seconds": 3}]', '[{"began": 1, "seconds": {"step": "x"}}]', "[" * 100_000]
)
def test_a_record_that_cannot_be_read_is_left_behind(tmp_path, caplog, content):
  (tmp_path / FILE).write_text(content)
  start(tmp_path, first=0, last=1, step_seconds=1)
  assert "cannot be read" in caplog.text and len(json.loads((tmp_path / FILE).read_text())) == 1


def test_no_record_no_section():
  assert table([]) == ""
