"""The projection head against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from vit_jax import weights
from vit_jax.models import ProjectionHead

GOLDEN = Golden("dino_head")


@pytest.mark.parametrize("case", sorted(GOLDEN.settings))
def test_scores_bottleneck_and_gradients_equal_the_reference(case):
  g, s = GOLDEN.under(case), GOLDEN.settings[case]
  head = ProjectionHead(
    hidden=s["hidden_dim"],
    bottleneck=s["bottleneck_dim"],
    prototypes=s["out_dim"],
    num_layers=s["nlayers"],
    mlp_bias=s.get("mlp_bias", True),
  )
  params = jax.tree.map(jnp.asarray, weights.from_state_dict(GOLDEN.under(f"{case}/sd"), head))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())  # noqa: E731
  close(head.apply({"params": params}, g["x"]), g["out"])
  close(head.apply({"params": params}, g["x"], method="project"), g["bottleneck"])
  close(head.apply({"params": params}, g["bottleneck"], method="scores"), g["only_last"])

  def test_function(p, x):
    return jnp.sum(head.apply({"params": p}, x) * g["cotangent"])

  by_params, by_x = jax.grad(test_function, argnums=(0, 1))(params, jnp.asarray(g["x"]))
  np.testing.assert_allclose(by_x, g["grad_x"], rtol=0, atol=1e-5 * np.abs(g["grad_x"]).max())
  ours = weights.to_state_dict(by_params, head)
  for name, want in GOLDEN.under(f"{case}/grad").items():
    np.testing.assert_allclose(ours[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name)


def test_a_zero_feature_gives_finite_scores_and_gradients():
  head = ProjectionHead(hidden=8, bottleneck=4, prototypes=6)
  params = head.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]
  grads = jax.grad(lambda x: jnp.sum(head.apply({"params": params}, x)))(jnp.zeros((2, 5)))
  assert np.all(np.isfinite(grads))
