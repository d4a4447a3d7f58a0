"""A request to stop is answered at once, whatever the run is doing, and leaves no trace in what it becomes."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from tests.train.jobs import ROOT, environment, overrides, reads_that_hang
from tests.train.test_loop import one_device, tiny  # noqa: F401  (a fixture)
from vit_jax import config as configs
from vit_jax.checkpoints import Checkpoints, read_meta, restore_params, steps
from vit_jax.data.pipeline import Pipeline
from vit_jax.train import goodput, loop
from vit_jax.train.evaluations import Evaluations
from vit_jax.train.interrupts import RESUMABLE, Stopped
from vit_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("one_device")
SETTINGS = {"evaluation.every": "2 steps", "checkpoint.every": "3 steps", "log.tensorboard": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of four steps that nobody stopped."""
  workdir = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *_: devices)
    train(tiny(**SETTINGS, **{"log.pictures": True}), str(workdir))
  return workdir


def asking(original, when, number, released):
  """The function, at whose call `when` somebody asks the run to stop; it then hangs, as on a source that stalls."""
  calls = itertools.count(1)

  def call(*args, **options):
    if next(calls) == when:
      os.kill(os.getpid(), number)
      released.wait(100)
    return original(*args, **options)

  return call


# What is stopped: the call of a function (evaluations are made at steps 0, 2 and 4), and the step that is saved.
PLACES = [
  (Evaluations, "scores", 2, 2, signal.SIGTERM),
  (Evaluations, "scores", 3, 4, signal.SIGINT),
  (Evaluations, "pictures", 2, 2, signal.SIGTERM),
  (Pipeline, "__next__", 4, None, signal.SIGTERM),  # some are read ahead: which step waits does not matter
]


@pytest.mark.parametrize(("owner", "name", "when", "step", "number"), PLACES)
def test_what_takes_long_is_given_up_and_made_again(whole, tmp_path, monkeypatch, owner, name, when, step, number):
  config, released = tiny(**SETTINGS, **{"log.pictures": True}), threading.Event()
  with monkeypatch.context() as patch:
    patch.setattr(owner, name, asking(getattr(owner, name), when, number, released))
    with pytest.raises(Stopped) as stopped:
      train(config, str(tmp_path))
    released.set()
  assert stopped.value.code == (130 if number == signal.SIGINT else RESUMABLE)
  saved = steps(tmp_path)[-1]
  assert saved == stopped.value.step and (saved == step or step is None)
  assert read_meta(tmp_path)["evaluated"] == (step is None)
  assert "Stopped on request" in (tmp_path / "summary.md").read_text()
  train(config, str(tmp_path))
  assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  for ours, expected in zip(
    jax.tree.leaves(restore_params(tmp_path, ())), jax.tree.leaves(restore_params(whole, ())), strict=True
  ):
    np.testing.assert_array_equal(ours, expected)
  pictures = [sorted(path.name for path in (folder / "pictures").iterdir()) for folder in (tmp_path, whole)]
  assert pictures[0] == pictures[1]
  for key in ("best", "metrics", "evaluated"):
    assert read_meta(tmp_path)[key] == read_meta(whole)[key], key
  assert "Stopped" not in (tmp_path / "summary.md").read_text()


def test_before_the_first_step_a_run_ends_at_once_though_its_evaluation_hangs(tmp_path, monkeypatch):
  released = threading.Event()
  monkeypatch.setattr(Evaluations, "scores", asking(Evaluations.scores, 1, signal.SIGTERM, released))
  begun = time.monotonic()
  with pytest.raises(Stopped):
    train(tiny(**SETTINGS), str(tmp_path))
  released.set()
  assert not steps(tmp_path) and time.monotonic() - begun < 90
  assert not (tmp_path / "run.lock").exists()


def test_a_full_disk_ends_a_run_in_words_whatever_else_cannot_be_written(tmp_path, monkeypatch, caplog):
  real = os.fsync

  def full(descriptor):
    if (tmp_path / "checkpoints" / "2").exists():
      raise OSError(errno.ENOSPC, "No space left on device")
    real(descriptor)

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(configs.UserError, match=r"No space left on device\); step \d is saved.*full.*goes on") as ended:
    train(tiny(**{"evaluation.every": "0 steps", "duration": "40 steps"}), str(tmp_path))
  assert "\n" not in str(ended.value)
  said = [record.getMessage() for record in caplog.records]
  assert any("goodput.json: cannot be written (No space left" in line for line in said)
  assert any("summary.md cannot be written" in line for line in said)
  monkeypatch.undo()


@pytest.mark.slow
def test_a_command_whose_disk_is_full_ends_in_a_few_words(tmp_path):
  """Files cannot grow beyond a size: as a full disk, for checkpoints, TensorBoard and timing."""
  command = [sys.executable, "-m", "vit_jax", "train", "--config=configs/tiny.py", f"--workdir={tmp_path}/run"]
  full = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh", *command]  # in units of 512 or 1024 bytes
  flags = overrides(duration="100000 steps", checkpoint__every="5 steps", compilation_cache="off")
  environ = environment(tmp_path)
  done = subprocess.run([*full, *flags], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
  assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
  assert "vit-jax: " in done.stderr.splitlines()[-1] and "File too large" in done.stderr.splitlines()[-1]
  assert "then the same command goes on" in done.stderr.splitlines()[-1]


def test_what_fails_at_the_end_does_not_hide_why_the_run_ended(tmp_path, monkeypatch, caplog):
  def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  def lost(*_):
    raise configs.UserError("the reason")

  write, close, stop = goodput.files.write_json, Pipeline.close, Checkpoints.close
  monkeypatch.setattr(loop._Loop, "_log", lost)
  monkeypatch.setattr(loop, "write_summary", fail)
  monkeypatch.setattr(
    goodput.files, "write_json", lambda path, *a, **b: fail() if path.name == goodput.FILE else write(path, *a, **b)
  )
  monkeypatch.setattr(Pipeline, "close", lambda self, *_: (close(self), fail()))
  monkeypatch.setattr(Checkpoints, "close", lambda self: (stop(self), fail()))
  monkeypatch.setattr("vit_jax.train.writers.JsonLines.sync", fail)
  with pytest.raises(configs.UserError, match="the reason"):
    train(tiny(**{"evaluation.every": "0 steps"}), str(tmp_path))
  for what in ("goodput.json", "summary.md", "The data could", "The metrics could", "The checkpoints could"):
    assert any(what in record.getMessage() for record in caplog.records), what


def test_before_the_first_step_a_run_ends_at_once_though_a_read_of_its_data_hangs(tmp_path, monkeypatch, caplog):
  released, reading = threading.Event(), threading.Event()

  def hang(*_):
    reading.set()
    if not released.wait(60):  # the test has failed, and is to end
      released.set()
    raise OSError("late")

  def ask():
    reading.wait(100)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr("vit_jax.data.reading.Reader.__getitem__", hang)
  threading.Thread(target=ask, daemon=True).start()
  with pytest.raises(Stopped) as stopped:
    train(tiny(**{"evaluation.every": "0 steps", "log.tensorboard": False}), str(tmp_path))
  assert not released.is_set() and stopped.value.code == RESUMABLE
  assert "nothing new to save" in caplog.text and "hang; their threads are left" in caplog.text
  released.set()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_that_hangs_does_not_keep_a_process_from_saving_and_ending(tmp_path, workers):
  photos, workdir, log = tmp_path / "photos", tmp_path / "run", tmp_path / "log"
  variables, flag = reads_that_hang(tmp_path)
  photos.mkdir()
  for i in range(40):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(photos / f"{i:02}.png")
  flags = overrides(
    data__source=f"folder:{photos}", data__workers=workers, duration="100000 steps", checkpoint__every="100000 steps"
  )
  command = [sys.executable, "-m", "vit_jax", "train", "--config=configs/tiny.py", f"--workdir={workdir}", *flags]
  with open(log, "w") as output:
    process = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path) | variables, stdout=output, stderr=output)
  try:
    until = time.monotonic() + 200
    while "step 3/" not in log.read_text():
      assert process.poll() is None and time.monotonic() < until, log.read_text()
      time.sleep(0.05)
    flag.touch()
    time.sleep(5)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == RESUMABLE, log.read_text()
    assert time.monotonic() - begun < 20
    assert len(steps(workdir)) == 1, log.read_text()
  finally:
    process.kill()
    process.wait()


def test_a_damaged_config_is_taken_from_the_checkpoint_and_written_again(whole, tmp_path, caplog):
  for number, damage in enumerate(["", "{", "[]", "[" * 100_000, "{}", None]):
    workdir = tmp_path / str(number)
    subprocess.run(["cp", "-r", whole, workdir], check=True)
    path = workdir / "config.json"
    path.unlink() if damage is None else path.write_text(damage)
    caplog.clear()
    with caplog.at_level(logging.INFO):
      train(tiny(**SETTINGS, **{"log.pictures": True}), str(workdir))
    assert f"{path}" in caplog.text and "going on with the config that checkpoint 4 holds" in caplog.text
    assert "complete" in caplog.text
    assert json.loads(path.read_text()) == json.loads((whole / "config.json").read_text())
  path.write_text("{")
  with pytest.raises(configs.ConfigError, match=r"(?s)started with another config.*optim.clip"):
    train(tiny(**SETTINGS, **{"optim.clip": 1.5}), str(workdir))


def test_metrics_that_are_lost_are_said_to_be(whole, tmp_path, caplog):
  workdir = tmp_path / "run"
  subprocess.run(["cp", "-r", whole, workdir], check=True)
  train(tiny(**SETTINGS, **{"log.pictures": True}), str(workdir))
  assert "is lost" not in caplog.text
  (workdir / "metrics.jsonl").unlink()
  train(tiny(**SETTINGS, **{"log.pictures": True}), str(workdir))
  assert "metrics.jsonl reaches step 0 only: what was written until step 4 is lost" in caplog.text
