"""A tiny teacher on disk, and configs that distil it."""

from __future__ import annotations

import functools

import jax

from vit_jax import config as configs
from vit_jax.checkpoints import Checkpoints
from vit_jax.methods.dino import dinov3

WIDTH = 48  # of the teacher: no other model of the tests has it


def tiny(*overrides, **values):
  """The resolved tiny config, changed by overrides as on the command line, then by values by dotted key."""
  c = configs.load("configs/tiny.py", list(overrides))
  c.mesh.data = c.mesh.replica = 1
  c.log.pictures = False
  c.update_from_flattened_dict(values)
  configs.validate(c)
  return configs.resolve(c, num_examples=64)


def save_teacher(workdir, *overrides, step=4, seed=0):
  """Saves an untrained run, wider than the tiny config's, and returns its folder."""
  config = tiny(f"model.width={WIDTH}", "model.layer_scale=1.0", *overrides)
  state = jax.jit(functools.partial(dinov3.init, config))(jax.random.key(seed))
  with Checkpoints(workdir) as checkpoints:
    checkpoints.save(step, state, {}, configs.to_dict(config), {})
  return workdir


def distilling(teacher, *overrides, **values):
  """A resolved config that distils a teacher."""
  method = ("method=distillation", f"distillation.teacher={teacher}")
  return tiny(*method, *overrides, **values)
