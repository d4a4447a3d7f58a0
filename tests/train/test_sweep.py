"""Sweeps of plans, with a planner that answers at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_jax import config as configs
from vit_jax.inspect.chips import topology
from vit_jax.inspect.errors import PlanError
from vit_jax.inspect.plan import Memory, Plan, frontier
from vit_jax.parallel import AXES
from vit_jax.train.sweep import sweep

WHERE = topology("h100:16")
SAVED = {"none": 8, "dots": 4, "attention": 6, "blocks": 1, "offload": 0.5}  # bytes of activations an image


def planner(config):
  """10 bytes of state, some for each image of a device, of 100; recomputation costs time."""
  shards = 16 // config.mesh.tensor
  used = 10 + SAVED[config.model.remat] * config.batch_size // shards
  seconds = (
    config.batch_size
    / 1000
    * {"none": 1.0, "dots": 1.1, "attention": 1.05, "blocks": 1.3, "offload": 1.5}[config.model.remat]
  )
  mesh = {axis: config.mesh[axis] if config.mesh[axis] > 0 else shards for axis in AXES}
  settings = {"batch_size": config.batch_size, "remat": config.model.remat}
  memory = Memory(parameters=10, optimizer=0, teachers=0, batch=0, temporary=used - 10, peak=used)
  times = {"compute": seconds, "hbm": 0.0, "network": 0.0, "traffic": 0.0, "collectives": ()}
  return Plan("h100:16", "none", 16, mesh, settings, memory, 100, 1e9, 1e9, 1e15, **times)


@pytest.fixture
def config():
  c = configs.load(str(Path(__file__).parents[2] / "configs" / "tiny.py"))
  c.update_from_flattened_dict({"batch_size": 64, "loss_group_size": 2, "mesh.fsdp": -1, "mesh.data": 1})
  return c


def test_the_largest_batch_that_fits_is_found(config):
  plans = sweep(config, WHERE, ("batch",), planner)
  largest = max(plan.settings["batch_size"] for plan in plans if plan.fits)
  assert largest == 160  # 10 of 11.25 images a device, in loss groups of 2
  assert len(plans) <= 5
  assert "largest batch that fits: 160 with remat none" in frontier(plans)
  assert config.batch_size == 64


def test_it_is_found_from_above_too(config):
  config.batch_size = 1024
  plans = sweep(config, WHERE, ("batch",), planner)
  assert max(plan.settings["batch_size"] for plan in plans if plan.fits) == 160


def test_all_recomputation_and_meshes_are_tried(config):
  plans = sweep(config, WHERE, ("remat", "mesh"), planner)
  tried = {(plan.settings["remat"], tuple(plan.mesh.items())) for plan in plans}
  assert len(tried) == len(plans) and {remat for remat, _ in tried} == set(SAVED)
  assert len({mesh for _, mesh in tried}) >= 4
  assert all(plan.settings["batch_size"] == 64 for plan in plans)


def test_the_frontier_marks_what_nothing_beats(config):
  lines = frontier(sweep(config, WHERE, ("remat",), planner)).splitlines()
  assert {tuple(line.split()[:3]) for line in lines[1:6]} == {("*", "64", remat) for remat in SAVED}
  too_large = frontier(sweep(_of(config, batch_size=8192), WHERE, ("remat",), planner))
  assert "nothing that was tried fits" in too_large


def _of(config, **values):
  config.update(values)
  return config


def test_an_unknown_axis_is_refused(config):
  with pytest.raises(PlanError, match="'depth' is none of batch, remat, mesh"):
    sweep(config, WHERE, ("batch", "depth"), planner)
