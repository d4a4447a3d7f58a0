"""Going on with a run: on other devices, with other settings, after anything that can happen to it."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import vit_jax
from tests.train.jobs import ROOT, environment
from vit_jax import config as configs
from vit_jax.checkpoints import Checkpoints, read_meta, restore_params, steps
from vit_jax.train import loop, setup
from vit_jax.train.writers import read_lines


def tiny(**overrides):
  c = configs.load("configs/tiny.py")
  c.log.pictures = c.log.tensorboard = False
  c.update_from_flattened_dict(
    {"evaluation.every": "0 steps", "loss_group_size": 1, "koleo.loss_weight": 0.0} | overrides
  )
  return c


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
  """A run of two steps on eight devices over which parameters are spread too, in a folder whose checkpoints were lost:
  the folder, its last state and the warnings."""
  workdir, heard = tmp_path_factory.mktemp("spread"), logging.handlers.BufferingHandler(10_000)
  (workdir / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
  logging.getLogger("vit_jax").addHandler(heard)
  state = loop.train(tiny(**{"mesh.fsdp": 4, "mesh.data": 2, "duration": "2 steps"}), str(workdir))
  logging.getLogger("vit_jax").removeHandler(heard)
  return workdir, state, [record.getMessage() for record in heard.buffer if record.levelno >= logging.WARNING]


def values(tree):
  keys = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
  return [np.asarray(keys(leaf)) for leaf in jax.tree.leaves(tree)]


def see_devices(monkeypatch, number):
  devices = jax.devices()[:number]
  monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.mark.parametrize(
  ("devices", "mesh"),
  [
    (8, {"mesh.tensor": 2, "mesh.fsdp": 1, "mesh.data": 4}),
    (2, {"mesh.tensor": 2, "mesh.data": 1}),
    (1, {}),
    (4, {"mesh.replica": 2, "mesh.fsdp": 2, "mesh.data": 1}),
  ],
)
def test_a_state_comes_back_exactly_on_another_mesh(spread, monkeypatch, devices, mesh):
  workdir, state, _ = spread
  see_devices(monkeypatch, devices)
  wanted = loop.abstract_state(setup.prepare(tiny(**mesh))).saved()
  restored = Checkpoints(workdir).restore(wanted)
  for ours, expected in zip(values(restored.state), values(state.saved()), strict=True):
    np.testing.assert_array_equal(ours, expected)
  for leaf, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
    assert leaf.sharding == want.sharding


def test_a_run_goes_on_with_another_mesh_without_being_asked(spread, tmp_path, monkeypatch, caplog):
  workdir = shutil.copytree(spread[0], tmp_path / "run")
  lengthened = {"duration": "3 steps", "checkpoint.keep": 5, "data.prefetch": 1}
  see_devices(monkeypatch, 2)
  with pytest.raises(configs.ConfigError, match=r"duration: '2 steps' -> '3 steps'") as refused:
    loop.train(tiny(**lengthened, **{"mesh.data": 2}), str(workdir))
  assert "mesh." not in str(refused.value) and "checkpoint.keep" not in str(refused.value)
  (workdir / "config.json").unlink()  # the checkpoint says it too
  with pytest.raises(configs.ConfigError, match=r"duration: '2 steps' -> '3 steps'"):
    loop.train(tiny(**lengthened, **{"mesh.data": 2}), str(workdir))
  with caplog.at_level("INFO"):
    loop.train(tiny(**{"duration": "2 steps", "mesh.data": 2, "checkpoint.keep": 5}), str(workdir))
  assert "config changed: mesh.fsdp: 4 -> 1" in caplog.text and "complete" in caplog.text
  assert configs.read(workdir / "config.json").mesh.fsdp == 1


def test_a_step_says_what_made_it(spread):
  meta = read_meta(spread[0])
  assert (meta["step"], meta["devices"], meta["processes"]) == (2, 8, 1)
  assert meta["versions"]["grain"] and meta["versions"]["python"].startswith("3.")
  assert meta["metrics"]["loss"] == pytest.approx(read_lines(spread[0] / "metrics.jsonl")[-1]["loss"])


def test_a_model_is_loaded_without_reading_the_rest(tmp_path, monkeypatch):
  """Bytes that this process read from files, by the kernel's account."""
  account = Path("/proc/self/io")
  if not account.exists():
    pytest.skip("the kernel keeps no account of what a process reads")
  see_devices(monkeypatch, 1)
  config = configs.resolve(tiny(**{"dino.prototypes": 30_000, "dino.bottleneck": 64, "ibot.prototypes": 30_000}), 64)
  run = setup.prepare(config)
  state = loop.fresh_state(run)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state.saved(), {}, configs.to_dict(run.config), {})
  setup.remember(run.config, tmp_path, accept_change=False)
  on_disk = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
  read = lambda: int(account.read_text().split()[1])  # noqa: E731  rchar
  vit_jax.load_model(tmp_path)  # what is imported on the way
  before = read()
  _, params = vit_jax.load_model(tmp_path)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert on_disk > 10 * size and read() - before < 3 * size + 300_000


def test_a_run_chooses_its_crop_ratio_and_one_that_has_none_goes_on(tmp_path, monkeypatch):
  """None, as before there was such a key, means: an image that has the size already is not resized."""
  see_devices(monkeypatch, 1)
  config = tiny(**{"data.source": "embedded:textures?size=16&count=40"})
  run = setup.prepare(config)
  size = config.evaluation.image_size or config.crops.global_size
  assert run.config.evaluation.crop_ratio == (1.0 if size == 16 else 0.875)
  config.evaluation.image_size = 16
  assert setup.prepare(config).config.evaluation.crop_ratio == 1.0
  config.evaluation.image_size = 8
  run = setup.prepare(config)
  assert run.config.evaluation.crop_ratio == 0.875
  config.evaluation.crop_ratio = 0.5
  assert setup.prepare(config).config.evaluation.crop_ratio == 0.5
  older = run.config.copy_and_resolve_references()
  older.evaluation.crop_ratio = None
  setup.remember(older, tmp_path, accept_change=False)
  assert setup.check_unchanged(run.config, tmp_path, accept_change=False) == ["evaluation.crop_ratio: None -> 0.875"]


def test_a_lost_folder_of_checkpoints_is_said(spread):
  assert "No step was saved although metrics.jsonl reaches step 7: starting from zero." in spread[2]


def command(workdir, processes):
  start = [sys.executable, "-m", "vit_jax"] if processes == 1 else ["launch/local.sh", str(processes)]
  return [*start, "train", "--config=configs/tiny.py", f"--workdir={workdir}", *LONG]


LONG = ("--config.log.pictures=False", "--config.log.tensorboard=False", "--config.loss_group_size=4",
        "--config.duration=400 steps", "--config.checkpoint.every=7 steps", "--config.evaluation.every=60 steps",
        "--config.model.drop_path=0.3", "--config.checkpoint.keep_every=100 steps")  # fmt: skip
KILLS = 20


def killed_at_random(arguments, environ, workdir, rng):
  """Starts a job and kills all its processes at a random moment; the exit code."""
  start, patience = reached(workdir), int(rng.integers(0, 15))
  wait = rng.uniform(0.0, 6.0) if rng.random() < 0.25 else None  # a quarter dies while it starts
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
  with subprocess.Popen(arguments, cwd=ROOT, env=environ, start_new_session=True, **quiet) as job:
    if wait is not None:
      time.sleep(wait)
    while wait is None and job.poll() is None and reached(workdir) <= start + patience:
      time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.3))
    os.killpg(job.pid, signal.SIGKILL)
  return job.returncode


def reached(workdir):
  """The last step in the metrics."""
  try:
    return json.loads((workdir / "metrics.jsonl").read_bytes().splitlines()[-1])["step"]
  except (OSError, IndexError, ValueError):
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_leave_no_trace(tmp_path, processes):
  environ, rng = environment(tmp_path), np.random.default_rng(0)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  subprocess.run(command(whole, processes), cwd=ROOT, env=environ, check=True, capture_output=True)
  again = command(killed, processes)
  codes = [killed_at_random(again, environ, killed, rng) for _ in range(KILLS)]
  assert codes == [-signal.SIGKILL] * KILLS  # none had come to its end before
  subprocess.run(again, cwd=ROOT, env=environ, check=True, capture_output=True)
  assert steps(killed) == steps(whole)
  for step in steps(whole):
    chex.assert_trees_all_equal(restore_params(killed, (), step), restore_params(whole, (), step))
    assert read_meta(killed, step)["metrics"] == read_meta(whole, step)["metrics"]
  assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
