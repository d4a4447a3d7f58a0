"""Feature-map resizing against PyTorch's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from vit_jax.ops.resize import resize_map

GOLDEN = Golden("feature_resize")


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("case", ["6to4", "8to4", "7to5", "4to7"])
def test_resizing_equals_the_reference(case, method, antialias):
  g = GOLDEN.under(case)
  want = g[f"{method}_{'antialias' if antialias else 'plain'}"]  # [B, D, h, w]
  got = resize_map(jnp.asarray(g["features"].transpose(0, 2, 3, 1)), want.shape[2:], method=method, antialias=antialias)
  np.testing.assert_allclose(np.asarray(got).transpose(0, 3, 1, 2), want, rtol=1e-5, atol=2e-6)


def test_an_unknown_method_is_named():
  with pytest.raises(ValueError, match="bicubic"):
    resize_map(jnp.zeros((1, 2, 2, 1)), (4, 4), method="lanczos")
