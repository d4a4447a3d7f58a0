"""Plans against what really happens, on simulated devices; and what a user is told when there is none."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import cli
from vit_jax import config as configs
from vit_jax.config import ConfigError
from vit_jax.inspect.chips import topology
from vit_jax.inspect.errors import PlanError
from vit_jax.inspect.plan import Plan, report
from vit_jax.train import loop, planning

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
WHERE = topology("h100:8")


def tiny(**overrides):
  c = configs.load(str(TINY))
  c.update_from_flattened_dict(
    {"batch_size": 16, "loss_group_size": 2, "mesh.data": 2, "mesh.fsdp": 4, "data.augment": "host"} | overrides
  )
  return c


@pytest.fixture(scope="module")
def planned():
  return planning.make_plan(tiny(), WHERE, jax.devices(), "cpu")


@pytest.fixture(scope="module")
def real():
  """(run, compiled step, state, batch) on the same devices."""
  run = planning.prepare(tiny(), jax.devices())
  state, batch = loop.abstract_state(run), loop.abstract_batch(run, run.views)
  with loop.mesh_context(run.mesh):
    compiled = loop.jitted_step(run, state, run.views).lower(state, batch).compile()
  arrays = {name: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for name, x in batch.items()}
  return compiled, loop.fresh_state(run), arrays


def held(tree, device):
  """Bytes of the arrays of a tree on one device."""
  plain = [jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
           for x in jax.tree.leaves(tree)]  # fmt: skip
  return sum(s.data.nbytes for x in plain for s in x.addressable_shards if s.device == device)


def test_planned_memory_is_what_the_step_uses(planned, real):
  compiled, state, batch = real
  memory, device = planned.memory, jax.devices()[3]
  assert memory.parameters == held(state.student, device)
  assert memory.optimizer == held(state.opt_state, device)
  assert memory.teachers == held(state.teacher, device)
  whole = held((state, batch), device)
  assert memory.parameters + memory.optimizer + memory.teachers + memory.batch == whole
  stats = compiled.memory_analysis()
  assert stats.argument_size_in_bytes <= whole <= memory.peak
  assert memory.peak == pytest.approx(whole + stats.temp_size_in_bytes, rel=0.02)
  after = compiled(state, batch)
  assert held(after[0], device) == held(jax.tree.map(lambda x: x, after[0]), device) <= memory.peak
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.student))  # donated: no second state in the peak


def test_a_plan_says_what_moves_and_how_long_it_takes(planned):
  kinds = {one.kind for one in planned.collectives}
  assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
  assert all(1 < one.group <= 8 for one in planned.collectives)
  assert planned.step_flops * 8 == pytest.approx(planned.model_flops * 16, rel=0.15)
  low, high = planned.step_seconds
  assert max(planned.compute, planned.hbm, planned.network) == low <= high
  assert planned.images_per_second[0] == pytest.approx(16 / low)
  assert planned.mfu[0] == pytest.approx(planned.model_flops * 16 / low / (8 * WHERE.chip.flops))
  page = report(planned, WHERE.chip)
  for words in ("optimizer", "all-gather", "-> fits", "MFU", "x images/s / (devices x peak FLOP/s)", "NVIDIA"):
    assert words in page


def test_a_plan_survives_json(planned):
  assert Plan.from_dict(json.loads(json.dumps(planned.to_dict()))) == planned


def test_a_config_that_does_not_fit_the_devices_is_refused_with_its_key():
  with pytest.raises(ConfigError, match="mesh.data=3"):
    planning.make_plan(tiny(**{"mesh.data": 3}), WHERE, jax.devices(), "cpu")


def test_what_the_other_process_says_of_the_config_reaches_the_user():
  with pytest.raises(ConfigError, match="mesh.data=3"):
    planning.plan(tiny(**{"mesh.data": 3}), WHERE, simulate=True)


def test_unknown_hardware_lists_the_known(capsys):
  assert cli.main(["plan", f"--config={TINY}", "--topology=v99:2x2"]) == 2
  said = capsys.readouterr().err
  assert "--topology=v99:2x2" in said and "v5p:4x4x8" in said and "h100:256" in said


def test_a_missing_compiler_names_the_extra(monkeypatch):
  monkeypatch.setattr(planning, "_installed", lambda name: False)
  with pytest.raises(PlanError, match=r"vit-jax\[tpu\].*--simulate"):
    planning.compiler_for(topology("v5p:2x2x2"), simulate=False)
  assert planning.compiler_for(topology("v5p:2x2x2"), simulate=True) == "cpu"
  assert planning.compiler_for(topology("h100:8"), simulate=False) == "cpu"
  monkeypatch.setattr(planning, "_installed", lambda name: True)
  assert planning.compiler_for(topology("v5p:2x2x2"), simulate=False) == "tpu"
  assert planning.compiler_for(topology("h100:8"), simulate=False) == "gpu"


def test_what_a_compiler_lacked_is_read_from_its_error():
  said = "RESOURCE_EXHAUSTED: ... required for HLO temporaries (130.07G) exceeds available HBM (95.74G)."
  assert planning._wanted(said) == int(130.07 * 2**30)
  assert planning._wanted("Used 16.20G of 15.75G hbm.") == int(16.2 * 2**30)
  with pytest.raises(PlanError, match="INTERNAL"):
    planning._wanted("INTERNAL: no")


@pytest.mark.slow
def test_the_command_plans_in_a_process_of_its_own(tmp_path, capsys):
  command = ["plan", f"--config={TINY}", "--topology=h100:16", "--simulate", f"--json={tmp_path}/p.json"]
  command += ["--config.mesh.fsdp=16", "--config.mesh.data=1", "--config.batch_size=32", "--config.loss_group_size=2"]
  assert cli.main(command) == 0
  assert "h100:16: 16 devices, XLA for simulated CPU devices" in capsys.readouterr().out
  (plan,) = json.loads((tmp_path / "p.json").read_text())
  assert plan["mesh"]["fsdp"] == 16 and plan["fits"]
