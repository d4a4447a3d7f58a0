"""The exact GELU: values and gradients of the definition, and what its backward pass keeps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.ops.activations import gelu

POINTS = np.linspace(-8.0, 8.0, 401)
CDF = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in POINTS])
SLOPE = CDF + POINTS * np.exp(-0.5 * POINTS**2) / math.sqrt(2.0 * math.pi)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_gelu_and_its_slope_are_those_of_the_definition(dtype, tolerance):
  x = jnp.asarray(POINTS, dtype)
  y, back = jax.vjp(gelu, x)
  (slope,) = back(jnp.ones_like(x))
  assert y.dtype == slope.dtype == dtype
  # bfloat16 points are themselves off by up to 2**-8 of |x|, and so are the values.
  np.testing.assert_allclose(np.float64(y), POINTS * CDF, rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(np.float64(slope), SLOPE, rtol=tolerance, atol=2 * tolerance)


def test_the_backward_pass_keeps_the_input_alone():
  kept = jax.tree.leaves(jax.vjp(gelu, jnp.asarray(POINTS, jnp.float32))[1])
  assert [array.shape for array in kept] == [POINTS.shape]
