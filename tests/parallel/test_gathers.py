"""How often the weights of a block travel: once for all crop resolutions in each pass, and their gradient once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.parallel.step import QUICK
from vit_jax import parallel
from vit_jax.inspect.collectives import Moved, moved
from vit_jax.inspect.hlo import Program
from vit_jax.models import VisionTransformer
from vit_jax.train.loop import mesh_context

DEPTH, WIDTH, HEADS, HIDDEN, ROWS = 5, 48, 4, 112, 16
TENSOR = {"fsdp": 1, "mixed": 2}


def kernels(tensor: int) -> list[tuple[int, ...]]:
  """The shapes of a block's kernels where `tensor` devices share each."""
  heads, hidden = HEADS // tensor, HIDDEN // tensor
  return [(WIDTH, 3, heads, WIDTH // HEADS), (heads, WIDTH // HEADS, WIDTH), (WIDTH, hidden), (hidden, WIDTH)]


MESHES = {"fsdp": {"fsdp": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2}}


@functools.cache
def compiled(mesh_name: str, remat: str) -> tuple[str, tuple[Moved, ...]]:
  """A backward pass over two resolutions in bfloat16, and what it moves."""
  mesh = parallel.make_mesh(dict(replica=1, data=1, fsdp=1, tensor=1) | MESHES[mesh_name])
  sizes = {"width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_hidden": HIDDEN, "patch_size": 8}
  model = VisionTransformer(**sizes, remat=remat, dtype=jnp.bfloat16)
  crops = [jax.ShapeDtypeStruct((ROWS, s, s, 3), jnp.float32, sharding=parallel.batch_sharding(mesh)) for s in (32, 16)]
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  place, name = parallel.parameter_sharding(mesh), functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(name(path), x.shape)), shapes
  )

  def loss(params, crops):
    return sum(jnp.mean(jnp.square(f.prenorm)) for f in model.apply({"params": params}, crops, train=True))

  where = jax.tree.map(lambda x: x.sharding, params)
  with mesh_context(mesh):
    step = jax.jit(jax.grad(loss), out_shardings=where).lower(params, crops).compile(compiler_options=QUICK)
  return step.as_text(), tuple(moved(Program(step.as_text()), mesh))


CASES = [("fsdp", "none"), ("mixed", "blocks"), pytest.param("fsdp", "dots", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("mesh", "remat"), CASES)
def test_the_weights_of_a_block_are_gathered_once_a_pass_for_all_resolutions(mesh, remat):
  for shape in kernels(TENSOR[mesh]):  # along `tensor` they stay apart
    gathers = [one for one in compiled(mesh, remat)[1] if one.kind == "all-gather" and one.shape == shape]
    assert [(one.axes, one.times) for one in gathers] == 2 * [(("fsdp",), DEPTH)]  # forward and backward


@pytest.mark.parametrize(("mesh", "remat"), CASES)
def test_their_gradient_is_summed_over_devices_once_for_all_resolutions(mesh, remat):
  over = tuple(axis for axis in MESHES[mesh] if axis != "tensor")
  for shape in kernels(TENSOR[mesh]):
    sums = [one for one in compiled(mesh, remat)[1] if one.kind == "all-reduce" and one.shape == shape]
    assert [(one.axes, one.times) for one in sums] == [(over, DEPTH)]


@pytest.mark.parametrize(("mesh", "remat"), CASES)
def test_gathered_weights_are_not_kept_for_the_backward_pass(mesh, remat):
  text = compiled(mesh, remat)[0]
  for shape in kernels(TENSOR[mesh]):
    assert f"[{','.join(map(str, (DEPTH, *shape)))}]" not in text
