"""Checkpoints of several processes: other numbers of them, and damage that only one of them meets."""

from __future__ import annotations

import pathlib
import re
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from vit_jax.checkpoints import Checkpoints, read_meta, restore_params, steps

PROGRAM = """
import sys
import jax
port, count, index, workdir, task = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // count)
if count > 1:
  jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from vit_jax.checkpoints import Checkpoints, reading
axes = {"fsdp": (1, 4, 1), "tensor": (1, 1, 4), "both": (1, 2, 2)}[task.split(",")[0]]
mesh = jax.make_mesh(axes, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
specs = {"kernel": P("fsdp", "tensor"), "scale": P()}
def values(step):
  rng = np.random.default_rng(step)
  return {"kernel": rng.normal(size=(64, 96)).astype(np.float32), "scale": rng.normal(size=(96,)).astype(np.float32)}
def place(step):
  make = lambda name, v: jax.make_array_from_callback(v.shape, NamedSharding(mesh, specs[name]), v.__getitem__)
  return {name: make(name, v) for name, v in values(step).items()}
checkpoints = Checkpoints(workdir)
if "blind" in task and index == 1:  # this process alone cannot read the newest step
  read = reading.read_arrays
  def fail(folder, *args, **options):
    if folder.name == str(checkpoints.latest_step()):
      raise OSError("input/output error")
    return read(folder, *args, **options)
  reading.read_arrays = fail
newest = checkpoints.latest_step() or 0
if newest:
  restored = checkpoints.restore(place(0))
  expected = values(restored.step)
  for name, array in restored.state.items():
    assert array.sharding == NamedSharding(mesh, specs[name])
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, expected[name][shard.index])
  print("restored", restored.step, flush=True)
checkpoints.save(newest + 1, place(newest + 1), {"next": newest + 1}, {}, {})
checkpoints.close()
"""


def start(workdir: pathlib.Path, count: int, task: str) -> list[int | None]:
  """Runs the program as a job of so many processes; the steps that they restored."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  jobs = [
    subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(PROGRAM), port, str(count), str(index), str(workdir), task],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]
  try:
    outputs = [job.communicate(timeout=400) for job in jobs]
  finally:
    for job in jobs:
      job.kill()
  for job, (_, errors) in zip(jobs, outputs, strict=True):
    assert job.returncode == 0, errors[-3000:]
  found = [re.search(r"^restored (\d+)$", out, re.M) for out, _ in outputs]
  return [int(match[1]) if match else None for match in found]


@pytest.mark.slow
def test_any_number_of_processes_goes_on_with_any_mesh(tmp_path: pathlib.Path):
  start(tmp_path, 1, "fsdp")
  assert start(tmp_path, 4, "tensor") == [1] * 4
  assert start(tmp_path, 2, "both") == [2] * 2
  assert read_meta(tmp_path)["processes"] == 2
  assert start(tmp_path, 1, "tensor") == [3]
  assert steps(tmp_path) == (2, 3, 4)
  expected = np.random.default_rng(3).normal(size=(64, 96)).astype(np.float32)
  np.testing.assert_array_equal(restore_params(tmp_path, (), 3)["kernel"], expected)


@pytest.mark.slow
def test_what_one_process_cannot_read_all_leave(tmp_path: pathlib.Path):
  start(tmp_path, 2, "fsdp")
  start(tmp_path, 2, "fsdp")
  assert start(tmp_path, 2, "fsdp,blind") == [1] * 2
  assert (tmp_path / "checkpoints_damaged" / "2").exists() and steps(tmp_path) == (1, 3)
  assert Checkpoints(tmp_path).latest_step() == 3
