"""The table of how a state lies on a mesh."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import cli, parallel
from vit_jax import config as configs
from vit_jax.inspect.sharding import leaves, sharding_table
from vit_jax.methods.dino import dinov3

CONFIGS = Path(__file__).parents[2] / "configs"


@functools.cache
def state():
  config = configs.load("configs/tiny.py")
  return jax.eval_shape(functools.partial(dinov3.init, config), jax.random.key(0))


def mesh(num_devices=8, **axes):
  return parallel.abstract_mesh(dict(replica=1, data=1, fsdp=1, tensor=1) | axes, num_devices)


def test_bytes_per_device_are_those_of_arrays_on_real_devices():
  where = parallel.make_mesh(dict(replica=1, data=2, fsdp=2, tensor=2))
  for zero in (3, 1):
    shardings = parallel.state_shardings(state(), where, zero=zero).student
    student = jax.tree.map(lambda s, to: jax.device_put(np.zeros(s.shape, s.dtype), to), state().student, shardings)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(student))
    ours = leaves(state(), mesh(data=2, fsdp=2, tensor=2), zero=zero)
    assert held == sum(leaf.held for leaf in ours if leaf.part == "student")


def test_table_lists_every_parameter_and_sums_the_parts():
  text = sharding_table(state(), mesh(fsdp=4, tensor=2))
  assert "8 devices: fsdp 4 x tensor 2; zero 3" in text
  assert re.search(r"student/dino_head/last_layer/kernel +16 x 32 +\(-, tensor.fsdp\) +256 B", text)
  rows = [line.split() for line in text.splitlines() if line.startswith(("student ", "teacher ", "optimizer "))]
  student, teacher, moments = rows
  assert student[1] == teacher[1]
  assert int(moments[1].replace(",", "")) == 2 * int(student[1].replace(",", ""))


def test_data_parallel_parameters_are_whole_on_every_device():
  for leaf in leaves(state(), mesh(data=8)):
    assert leaf.whole and leaf.held == leaf.bytes


def test_7b_on_256_devices_is_described_without_making_it(capsys):
  config = CONFIGS / "dinov3" / "vit7b16_pretrain.py"
  assert cli.main(["inspect", "sharding", f"--config={config}", "--devices=256"]) == 0
  out = capsys.readouterr().out
  assert re.search(r"/blocks/attn/qkv/kernel +40 x 4096 x 3 x 32 x 128 +\(-, fsdp, -, -, -\) +30.0 MiB", out)
  total = next(line.split() for line in out.splitlines() if line.startswith("all "))
  assert total[-3:-1] == ["449.9", "MiB"]
  assert float(total[-1].rstrip("%")) < 0.1


def test_a_mesh_that_does_not_divide_is_shown_and_refused(capsys):
  flags = ["--devices=24", "--config.mesh.data=1", "--config.mesh.fsdp=24", "--config.batch_size=48"]
  assert cli.main(["inspect", "sharding", f"--config={CONFIGS / 'dinov3_vits16.py'}", *flags]) == 2
  shown = capsys.readouterr()
  assert "(fsdp, -)" in shown.out
  assert "vit-jax: mesh.fsdp=24: does not divide" in shown.err
  assert "set mesh.fsdp=8" in shown.err


@pytest.mark.parametrize("stage", ["pretrain", "gram_anchor", "high_res"])
def test_7b_recipes_leave_next_to_nothing_whole(stage):
  c = configs.load(str(CONFIGS / "dinov3" / f"vit7b16_{stage}.py"))
  shapes = jax.eval_shape(functools.partial(dinov3.init, c), jax.random.key(0))
  parallel.check_spread(shapes, parallel.abstract_mesh(c.mesh, 256))
