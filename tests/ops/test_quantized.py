"""Products of 8-bit numbers against the same arithmetic in NumPy, and against exact products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vit_jax import parallel
from vit_jax.inspect.collectives import moved
from vit_jax.inspect.hlo import Program
from vit_jax.models import VisionTransformer
from vit_jax.models.products import products
from vit_jax.ops.linear import kernel_gradient
from vit_jax.ops.quantized import QUANTIZATIONS, quantize, quantized_product
from vit_jax.train.loop import mesh_context

LARGEST = {"fp8": 448.0, "int8": 127.0}
ERROR = {"fp8": 0.05, "int8": 0.02}  # of a product of normal numbers: fp8 has 3 bits after the point
SIZES = {"width": 32, "depth": 2, "num_heads": 4, "mlp_hidden": 96, "patch_size": 8}


def in_numpy(x, kind, axes):
  """(values, scales) by ml_dtypes' rounding."""
  scale = np.maximum(np.abs(x).max(axis=axes, keepdims=True), 1e-12).astype(np.float32) / np.float32(LARGEST[kind])
  values = (x / scale).astype(np.float32)
  values = np.rint(values) if kind == "int8" else values.astype(ml_dtypes.float8_e4m3fn)
  return values.astype(np.float32), scale


def distance(a, b):
  return np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 5, 32)).astype(np.float32) * np.geomspace(1e-3, 1e3, 15).reshape(3, 5, 1)
  kernel = rng.normal(size=(4, 8, 24)).astype(np.float32) * np.geomspace(1e-2, 1e2, 24)
  return x.astype(np.float32), kernel.astype(np.float32), rng.normal(size=(3, 5, 24)).astype(np.float32)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_row_uses_the_whole_range(kind, arrays):
  values, scale = quantize(arrays[0], kind, (2,))
  assert values.dtype.itemsize == 1 and scale.shape == (3, 5, 1) and scale.dtype == np.float32
  np.testing.assert_array_equal(np.abs(np.asarray(values, np.float32)).max(axis=2), LARGEST[kind])
  zeros, scale = quantize(jnp.zeros((2, 4)), kind, (1,))
  assert not np.asarray(zeros, np.float32).any() and np.isfinite(scale).all()


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_product_is_that_of_the_rounded_numbers_and_near_the_exact_one(kind, arrays):
  x, kernel, _ = arrays
  kernel = kernel.reshape(32, 24)
  values, scale = quantize(kernel, kind, (0,))
  found = quantized_product(x, values, scale, kind)
  (rows, row_scale), (weights, weight_scale) = in_numpy(x, kind, (2,)), in_numpy(kernel, kind, (0,))
  np.testing.assert_allclose(found, rows @ weights * row_scale * weight_scale, rtol=1e-5)
  assert distance(found / row_scale / weight_scale, x @ kernel / row_scale / weight_scale) < ERROR[kind]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_gradient_of_tokens_is_rounded_by_one_scale_of_the_weight_that_of_weights_not_at_all(kind, arrays):
  """As the reference: rows of the gradient have scales of their own, the transposed weight has one."""
  x, kernel, gradient = arrays
  _, pull = jax.vjp(lambda xs, w: products(xs, w, 2, (None,) * 3, jnp.float32, kind), (x, 2 * x), kernel)
  (by_x, _), by_kernel = pull((gradient, gradient))
  (rows, row_scale), (weights, scale) = in_numpy(gradient, kind, (2,)), in_numpy(kernel, kind, (0, 1, 2))
  expected = rows @ weights.reshape(32, 24).T * row_scale * scale.reshape(1)
  np.testing.assert_allclose(by_x, expected, rtol=2e-5, atol=1e-5 * np.abs(expected).max())
  exact = kernel_gradient(x, gradient, kernel.reshape(32, 24)).reshape(kernel.shape)
  np.testing.assert_allclose(by_kernel, 3 * exact, rtol=1e-4, atol=1e-3)


@functools.cache
def features(kind):
  model = VisionTransformer(**SIZES, quantization=kind)
  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  return model.apply(model.init(jax.random.key(0), images), images).prenorm


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_model_has_the_same_parameters_and_nearly_the_same_features(kind):
  assert 0 < distance(features(kind), features(None)) < ERROR[kind]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_weights_travel_in_8_bits(kind):
  mesh = parallel.make_mesh(dict(replica=1, data=1, fsdp=8, tensor=1))
  model = VisionTransformer(**SIZES, quantization=kind, dtype=jnp.bfloat16)
  images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32, sharding=parallel.batch_sharding(mesh))
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  place, path_of = (
    parallel.parameter_sharding(mesh),
    functools.partial(jax.tree_util.keystr, simple=True, separator="/"),
  )
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(path_of(path), x.shape)), shapes
  )
  loss = lambda params, images: jnp.sum(model.apply({"params": params}, [images])[0].prenorm)  # noqa: E731
  with mesh_context(mesh):
    step = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda x: x.sharding, params)).lower(params, images)
    found = moved(Program(step.compile().as_text()), mesh)
  for shape in ((32, 3, 4, 8), (4, 8, 32), (32, 96), (96, 32)):
    gathers = [one for one in found if one.kind == "all-gather" and one.shape == shape]
    assert [(one.dtype, one.times) for one in gathers] == 2 * [("u8", 2)]  # forward and backward


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match="quantization='fp4': must be one of fp8, int8, or None"):
    VisionTransformer(**SIZES, quantization="fp4").check()
  with pytest.raises(ValueError, match="needs a multiple of 16 as mlp_hidden, which is 90"):
    VisionTransformer(**SIZES | {"mlp_hidden": 90}, quantization="fp8").check()
