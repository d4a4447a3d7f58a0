"""In a bfloat16 run, what needs float32 runs in float32; and the run tracks the float32 one."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.test_accumulation import abstract_batch, config_of, fresh_state
from tests.methods.test_dinov3 import batches
from vit_jax import parallel
from vit_jax.methods.dino import dinov3
from vit_jax.ops.quantized import QUANTIZATIONS

# All that may have a bfloat16 operand. Products accumulate in float32 and round once; the others move values, or round
# each value once. So nothing is summed, and no logarithm, exponential, root or quotient is taken, in bfloat16.
PRODUCTS = {"dot_general"}
MOVES = {
  "broadcast_in_dim", "concatenate", "copy", "gather", "name", "optimization_barrier", "pad", "reshape", "reshard",
  "scan", "select_n", "slice", "split", "squeeze", "stop_gradient", "transpose", "dynamic_slice",
  "dynamic_update_slice", "rev", "scatter",
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
  overrides = {"model.dtype": "bfloat16", "model.mlp": mlp, "model.num_registers": 2, "gram.source": "ema"}
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
    "Gram": ("dot_general", "/gram"),
    "AdamW": ("sqrt", "optimizer"),
  }
  for part, (name, path) in parts.items():
    assert any(op.name == name and path in op.path for op in float32), part
  for path in ("blocks/attn/qkv", "blocks/mlp/fc1", "last_layer"):
    assert any(op.name == "dot_general" and has(op, "bfloat16") and path in op.path for op in traced()), path


def test_products_of_losses_are_not_rounded_to_fewer_bits():
  """GPUs and TPUs take float32 products in TF32 or bfloat16 unless asked not to."""
  products = [
    op for op in traced() if op.name == "dot_general" and any(part in op.path for part in ("losses", "koleo", "gram"))
  ]
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


@pytest.mark.slow
def test_the_bfloat16_run_tracks_the_float32_run_for_twenty_steps():
  """Every loss term within 2 % of itself; KoLeo, which goes through zero, within 0.02."""
  runs = [losses_of(dtype) for dtype in ("bfloat16", "float32")]
  for step, (half, full) in enumerate(zip(*runs, strict=True)):
    for name in ("loss", "dino_local", "dino_global", "ibot", "gram"):
      assert half[name] == pytest.approx(full[name], rel=0.02), (step, name)
    assert half["koleo"] == pytest.approx(full["koleo"], abs=0.02), step


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_products_of_8_bits_track_the_bfloat16_run(kind):
  """The loss within 2 % of itself, as in bfloat16 instead of float32."""
  narrow, half = losses_of("bfloat16", kind), losses_of("bfloat16")
  ratios = np.array([a["loss"] / b["loss"] for a, b in zip(narrow, half, strict=True)])
  assert 0 < np.abs(ratios - 1).max() < 0.02


@functools.cache
def losses_of(dtype, quantization=None):
  """Metrics of twenty steps that move: a learning rate from the first on, three batches in turn."""
  config = config_of(1, 16, **{"model.dtype": dtype, "model.quantization": quantization, "gram.source": "ema"})
  step = jax.jit(dinov3.make_step(config))
  state, found = fresh_state(), []
  for index in range(20):
    rows = batches()[index % 3]
    state, metrics = step(state, rows)
    found.append({name: float(value) for name, value in jax.device_get(metrics).items()})
  return found
