"""A DINOv3 step with everything in it, compiled for a mesh of simulated devices."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax import config as configs
from vit_jax import parallel
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.sources import open_source
from vit_jax.methods.dino import dinov3
from vit_jax.train.loop import mesh_context

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # the step is tiny
IMAGES = 4  # per device, on eight of them
PROTOTYPES = (320, 448)
# Drop path, rescaled positions, registers, masked tokens, Gram anchoring, Sinkhorn-Knopp and softmax targets.
SIZES = {
  "batch_size": 8 * IMAGES,
  "loss_group_size": 2,
  "duration": "10 steps",
  "model.width": 48,
  "model.depth": 2,
  "model.num_heads": 4,
  "model.mlp_hidden": 112,
  "model.num_registers": 2,
  "model.layer_scale": 0.5,
  "model.drop_path": 0.5,
  "model.rope.rescale": 2.0,
  "dino.prototypes": PROTOTYPES[0],
  "dino.hidden": 40,
  "dino.bottleneck": 24,
  "ibot.prototypes": PROTOTYPES[1],
  "ibot.hidden": 56,
  "ibot.bottleneck": 88,
  "ibot.centering": "softmax",
  "ibot.mask_ratio": (0.1, 0.7),  # so many masked patches that their number is no size of a parameter
  "gram.source": "init",
  "optim.eps": 1e-3,  # Adam's first steps are otherwise the signs of gradients that are only rounding
}


class Compiled(NamedTuple):
  """A step and what it was compiled for."""

  config: Any
  mesh: Mesh
  shapes: Any  # of the state
  shardings: Any
  batch: Any  # shapes
  step: Any = None  # (state, batch) -> (state, metrics)


def config_of(**overrides: Any) -> Any:
  """The resolved config of the step."""
  c = configs.load("configs/tiny.py")
  c.update_from_flattened_dict(SIZES | overrides)
  configs.validate(c)
  return configs.resolve(c, num_examples=64)


def laid_out(num_devices: int, **overrides: Any) -> Compiled:
  """`compiled` without the step."""
  config = config_of(**overrides)
  mesh = parallel.make_mesh(config.mesh, jax.devices()[:num_devices])
  shapes = jax.eval_shape(functools.partial(dinov3.init, config), jax.random.key(0))
  parallel.check_spread(shapes, mesh)
  shardings = parallel.state_shardings(shapes, mesh, zero=config.mesh.zero)
  batch = {
    name: jax.ShapeDtypeStruct(shape, kind, sharding=parallel.batch_sharding(mesh))
    for name, (shape, kind) in dinov3.views(config).arrays(config.batch_size).items()
  }
  return Compiled(config, mesh, shapes, shardings, batch)


def compiled(num_devices: int, **overrides: Any) -> Compiled:
  """The step of `config_of(**overrides)` on so many devices; nothing is allocated."""
  what = laid_out(num_devices, **overrides)
  state = jax.tree.map(
    lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), what.shapes, what.shardings
  )
  step = jax.jit(dinov3.make_step(what.config), out_shardings=(what.shardings, None))
  with mesh_context(what.mesh):
    return what._replace(step=step.lower(state, what.batch).compile(compiler_options=QUICK))


@functools.cache
def batches(num: int = 10) -> list[dict]:
  """The first batches of the config's data."""
  config = config_of()
  views = dinov3.views(config)
  source = open_source(config.data.source)
  with make_pipeline(source, views, batch_size=config.batch_size, seed=0, workers=0) as pipeline:
    return [next(pipeline) for _ in range(num)]


@functools.cache
def first_state() -> Any:
  """The state that all runs start from, on the host; from NumPy, as the initialisation takes as long to compile."""
  shapes = jax.eval_shape(functools.partial(dinov3.init, config_of()), jax.random.key(0))
  rng, constants = np.random.default_rng(0), {"scale": 1.0, "gamma": 0.5, "bias": 0.0}

  def drawn(path: tuple, leaf: Any) -> np.ndarray:
    constant = constants.get(path[-1].key)
    return np.asarray(
      rng.normal(0, 0.05, leaf.shape) if constant is None else np.full(leaf.shape, constant), np.float32
    )

  student = jax.tree_util.tree_map_with_path(drawn, shapes.student)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.replace(key=None))
  own = zeros.own | {"gram_teacher": student["backbone"]}
  return zeros.replace(student=student, teacher=student, own=own, key=jax.random.key(0))


def losses(what: Compiled) -> list[dict[str, float]]:
  """The metrics of ten steps."""
  state = jax.device_put(first_state(), what.shardings)
  found = []
  for rows in batches():
    state, metrics = what.step(state, jax.device_put(rows, parallel.batch_sharding(what.mesh)))
    found.append({name: float(value) for name, value in jax.device_get(metrics).items()})
  return found
