"""Tests of vit_jax/train/writers.py: what a run writes survives crashes and continues exactly."""

from __future__ import annotations

import builtins
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vit_jax.train.writers import JsonLines, Writers, read_lines


def write_steps(writers, first, last):
  for step in range(first, last + 1):
    writers.scalars(step, {"loss": np.float32(10.0 / step), "lr": 1e-3 * step})
    if step % 5 == 0:
      writers.scalars(step, {"knn/top1": step / 100})
    writers.timing(step, {"images_per_second": time.perf_counter()})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  with Writers(workdir, tensorboard=False, resume_step=0) as writers:
    write_steps(writers, 1, 20)
  return (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("checkpoint", [0, 3, 10, 17])
def test_a_killed_and_resumed_run_writes_the_same_metrics_file(tmp_path, uninterrupted, checkpoint):
  with Writers(tmp_path, tensorboard=False, resume_step=0) as writers:
    write_steps(writers, 1, 17)
  with Writers(tmp_path, tensorboard=False, resume_step=checkpoint) as writers:
    write_steps(writers, checkpoint + 1, 20)
  assert (tmp_path / "metrics.jsonl").read_bytes() == uninterrupted


@pytest.mark.parametrize("recorded", [False, True])
def test_the_evaluation_at_the_checkpoint_step_appears_once(tmp_path, uninterrupted, recorded):
  with Writers(tmp_path, tensorboard=False, resume_step=0) as writers:
    write_steps(writers, 1, 9)
    writers.scalars(10, {"loss": np.float32(1.0), "lr": 1e-2})
    if recorded:  # killed after the evaluation at step 10, otherwise before it
      writers.scalars(10, {"knn/top1": 0.1})
  with Writers(tmp_path, tensorboard=False, resume_step=10) as writers:
    writers.scalars(10, {"knn/top1": 0.1})
    write_steps(writers, 11, 20)
  assert (tmp_path / "metrics.jsonl").read_bytes() == uninterrupted


@pytest.mark.parametrize(
  "torn", [b'{"step": 18, "lo', b'{"step": 18, "loss": 1.0}', b"\x00\x00\x00", b"[18]\n", b"{}\n"]
)
def test_a_torn_last_line_is_dropped_when_reopened(tmp_path, uninterrupted, torn, caplog):
  path = tmp_path / "metrics.jsonl"
  with Writers(tmp_path, tensorboard=False, resume_step=0) as writers:
    write_steps(writers, 1, 17)
  with open(path, "ab") as file:
    file.write(torn)
  assert [line["step"] for line in read_lines(path)][-1] == 17
  with Writers(tmp_path, tensorboard=False, resume_step=17) as writers:
    write_steps(writers, 18, 20)
  assert path.read_bytes() == uninterrupted
  assert "torn by a crash" in caplog.text and str(path) in caplog.text


def test_no_line_is_lost_when_the_process_is_killed(tmp_path):
  code = (
    "import sys, itertools; from vit_jax.train.writers import JsonLines\n"
    "lines = JsonLines(sys.argv[1])\n"
    "for step in itertools.count(1):\n"
    "  lines.write(step, {'loss': step / 7}); print(step, flush=True)\n"
  )
  path = tmp_path / "metrics.jsonl"
  process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
  for line in process.stdout:
    if int(line) >= 50:
      process.send_signal(signal.SIGKILL)
      break
  rest = process.stdout.read().split()
  process.stdout.close()
  process.wait()
  steps = [line["step"] for line in read_lines(path)]
  last_printed = int(rest[-1]) if rest else 50
  assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last_printed - 1


def test_reopening_without_a_step_keeps_every_line(tmp_path):
  lines = JsonLines(tmp_path / "a.jsonl")
  lines.write(5, {"x": 1})
  lines.close()
  lines = JsonLines(tmp_path / "a.jsonl")
  lines.write(5, {"x": 2})
  lines.close()
  assert [line["x"] for line in read_lines(tmp_path / "a.jsonl")] == [1, 2]


def test_values_are_strict_json_and_come_back_exactly(tmp_path):
  values = {
    "float32": np.float32(0.1),
    "float64": np.float64(0.1),
    "array": np.ones((1,), np.float32) / 3,
    "int": np.int32(3),
    "nan": np.float32("nan"),
    "inf": -math.inf,
    "flag": True,
  }
  with Writers(tmp_path, tensorboard=False) as writers:
    writers.scalars(np.int64(1), values)
  text = (tmp_path / "metrics.jsonl").read_text()
  json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
  assert '"float32": 0.1,' in text  # the short decimal of a float32, not 0.10000000149
  line = read_lines(tmp_path / "metrics.jsonl")[0]
  assert np.float32(line["float32"]) == np.float32(0.1) and line["float64"] == 0.1
  assert np.float32(line["array"]) == np.float32(1) / np.float32(3)
  assert line["int"] == 3 and line["flag"] == 1 and math.isnan(line["nan"]) and line["inf"] == -math.inf


def test_a_metric_that_is_no_number_is_named(tmp_path):
  with (
    Writers(tmp_path, tensorboard=False) as writers,
    pytest.raises(ValueError, match=r"'loss' has shape \(3,\)"),
  ):
    writers.scalars(1, {"loss": np.zeros(3)})


def test_pictures_and_texts_are_files(tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  with Writers(tmp_path, tensorboard=False) as writers:
    writers.images(12, {"crops/first": picture, "grey": picture[..., 0]})
    writers.text(0, {"config": "# old"})
    writers.text(1, {"config": "# new"})
    with pytest.raises(ValueError, match="float64"):
      writers.images(1, {"x": np.zeros((2, 2, 3))})
  assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / "crops_first_0000012.png")), picture)
  assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / "grey_0000012.png")), picture[..., 0])
  assert (tmp_path / "text" / "config.md").read_text() == "# new"
  assert not list(tmp_path.rglob("*.partial"))


def test_an_inactive_writer_touches_nothing(tmp_path):
  with Writers(tmp_path / "run", active=False) as writers:
    writers.scalars(1, {"loss": 1.0})
    writers.timing(1, {"a": 1.0})
    writers.images(1, {"a": np.zeros((2, 2, 3), np.uint8)})
    writers.text(1, {"a": "b"})
    writers.flush()
  assert not (tmp_path / "run").exists()


def test_tensorboard_gets_everything(tmp_path):
  pytest.importorskip("tensorboardX")
  from tensorboardX.proto.event_pb2 import Event

  with Writers(tmp_path, resume_step=3) as writers:
    writers.scalars(7, {"loss": 2.5})
    writers.images(7, {"crops": np.zeros((8, 8, 3), np.uint8)})
    writers.text(7, {"config": "hello"})
  events = []
  for path in sorted((tmp_path / "tensorboard").glob("events*")):
    data = path.read_bytes()
    while data:  # record: length u64, its checksum u32, data, checksum u32
      size = int.from_bytes(data[:8], "little")
      events.append(Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  tags = {value.tag: event.step for event in events for value in event.summary.value}
  assert tags["loss"] == 7 and tags["crops"] == 7 and any(tag.startswith("config") for tag in tags)
  starts = [event.step for event in events if event.HasField("session_log")]
  assert starts == [4]  # TensorBoard hides what an earlier process wrote at steps >= 4


def test_without_tensorboardx_one_warning_says_how_to_get_it(tmp_path, monkeypatch, caplog):
  real_import = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith("tensorboardX"):
      raise ImportError(name)
    return real_import(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  with caplog.at_level(logging.WARNING), Writers(tmp_path) as writers:
    writers.scalars(1, {"loss": 1.0})
  assert len(caplog.records) == 1 and "pip install 'vit-jax[tensorboard]'" in caplog.text
  assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_rewinding_is_atomic(tmp_path, monkeypatch):
  with Writers(tmp_path, tensorboard=False, resume_step=0) as writers:
    write_steps(writers, 1, 9)
  before = (tmp_path / "metrics.jsonl").read_bytes()

  def power_cut(*_):
    raise OSError("power cut")

  monkeypatch.setattr(os, "replace", power_cut)
  with pytest.raises(OSError, match="power cut"):
    Writers(tmp_path, tensorboard=False, resume_step=4)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl", "timing.jsonl"]


def test_damaged_lines_in_the_middle_are_named_left_out_and_kept_aside(tmp_path, uninterrupted, caplog):
  path = tmp_path / "metrics.jsonl"
  lines = uninterrupted.splitlines(keepends=True)
  damaged = [*lines[:3], b"[" * 100_000 + b"\n", b'{"step": 4, "loss": {}}\n', b"\xff\xfe\n", *lines[3:]]
  path.write_bytes(b"".join(damaged))
  with Writers(tmp_path, tensorboard=False, resume_step=20):
    pass
  assert path.read_bytes() == uninterrupted
  assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(damaged)
  for number in (4, 5, 6):
    assert f"{path}, line {number}: " in caplog.text


def test_a_full_disk_costs_pictures_and_timing_but_not_metrics(tmp_path, monkeypatch, caplog):
  pytest.importorskip("tensorboardX")
  with Writers(tmp_path, tensorboard=True) as writers:

    def full(*_):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr("vit_jax.train.writers.files.write_bytes", full)
    monkeypatch.setattr(writers._timing, "write", full)
    monkeypatch.setattr(writers._events.file_writer.event_writer._ev_writer._py_recordio_writer, "write", full)
    for step in range(100):  # more than TensorBoard's queue holds: nobody waits for a thread that is gone
      writers.scalars(step, {"loss": 1.0})
      writers.timing(step, {"seconds": 1.0})
      writers.images(step, {"a": np.zeros((2, 2, 3), np.uint8)})
  assert len(read_lines(tmp_path / "metrics.jsonl")) == 100
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 3 and all("No space left on device); the run goes on without" in line for line in said), said
