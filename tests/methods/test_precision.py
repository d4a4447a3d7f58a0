"""In a bfloat16 run, what needs float32 runs in float32; and the run tracks the float32 one."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from tests.methods.test_accumulation import abstract_batch, config_of
from vit_jax import parallel
from vit_jax.methods import dinov3

# All that may have a bfloat16 operand. Products accumulate in float32 and round once; the others move values, or round
# each value once. So nothing is summed, and no logarithm, exponential, root or quotient is taken, in bfloat16.
PRODUCTS = {"dot_general"}
MOVES = {
  "broadcast_in_dim", "concatenate", "copy", "gather", "optimization_barrier", "pad", "reshape", "reshard", "scan",
  "select_n", "slice", "split", "squeeze", "stop_gradient", "transpose", "dynamic_slice", "dynamic_update_slice", "rev",
}  # fmt: skip
ELEMENTWISE = {"add", "add_any", "convert_element_type", "mul", "neg", "sub"}
SCATTERS = {"scatter-add"}  # of rows that are all different: one addition each
ACTIVATIONS = {"erfc", "exp", "integer_pow", "logistic", "square", "div"}  # only inside of MLPs: GELU, SiLU
WRAPPERS = {"jit", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2", "closed_call"}


class Operation(NamedTuple):
  name: str
  operands: tuple
  path: str
  precision: object


def operations(jaxpr, path=""):
  for equation in jaxpr.eqns:
    here = f"{path}/{equation.source_info.name_stack}"
    yield Operation(
      equation.primitive.name,
      tuple(v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")),
      here,
      equation.params.get("precision"),
    )
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns") and not equation.primitive.name.startswith("scatter"):
          yield from operations(inner, here)


@functools.cache
def traced(mlp="gelu"):
  overrides = {"model.dtype": "bfloat16", "model.mlp": mlp, "model.num_registers": 2}
  config = config_of(2, 16, **overrides)
  state = jax.eval_shape(functools.partial(dinov3.init, config), jax.random.key(0))
  batch = abstract_batch(config, parallel.make_mesh(config.mesh, jax.devices()[:1]))
  return tuple(operations(jax.make_jaxpr(dinov3.make_step(config))(state, batch).jaxpr))


def has(operation, dtype):
  return jnp.dtype(dtype) in operation.operands


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_only_products_and_single_roundings_are_bfloat16(mlp):
  anywhere = PRODUCTS | MOVES | ELEMENTWISE | SCATTERS | WRAPPERS
  wrong = set()
  for operation in traced(mlp):
    if has(operation, "bfloat16") and operation.name not in anywhere:
      inside = "/mlp" in operation.path or "project" in operation.path
      if not (inside and operation.name in ACTIVATIONS):
        wrong.add((operation.name, operation.path))
  assert not wrong


def test_every_part_that_needs_float32_is_there_in_float32():
  """What the test above would miss: that a part is not there at all."""
  float32 = [operation for operation in traced() if has(operation, "float32")]
  parts = {
    "norms": ("rsqrt", "blocks/norm1"),
    "final norm": ("rsqrt", "final_norm"),
    "attention": ("exp", "blocks/attn"),
    "head": ("sqrt", "project"),
    "Sinkhorn-Knopp": ("log", "teacher"),
    "DINO and iBOT": ("log", "losses"),
    "their gradient": ("exp", "losses"),
    "KoLeo": ("log", "koleo"),
    "AdamW": ("sqrt", "optimizer"),
  }
  for part, (name, path) in parts.items():
    assert any(op.name == name and path in op.path for op in float32), part
  for path in ("blocks/attn/qkv", "blocks/mlp/fc1", "last_layer"):
    assert any(op.name == "dot_general" and has(op, "bfloat16") and path in op.path for op in traced()), path


def test_products_of_losses_are_not_rounded_to_fewer_bits():
  """GPUs and TPUs take float32 products in TF32 or bfloat16 unless asked not to."""
  products = [op for op in traced() if op.name == "dot_general" and any(s in op.path for s in ("losses", "koleo"))]
  highest = jax.lax.Precision.HIGHEST
  assert len(products) >= 4
  assert all(op.precision in (highest, (highest, highest)) for op in products), products


def test_parameters_moments_and_gradients_are_float32():
  config = config_of(2, 16, **{"model.dtype": "bfloat16"})
  state = jax.eval_shape(functools.partial(dinov3.init, config), jax.random.key(0))
  batch = abstract_batch(config, parallel.make_mesh(config.mesh, jax.devices()[:1]))
  after, metrics = jax.eval_shape(dinov3.make_step(config), state, batch)
  for tree in (after.student, after.teacher, after.opt_state.mu, after.opt_state.nu, metrics):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
