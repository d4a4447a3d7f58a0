"""Health metrics are what they say, on batches of which the answer is known."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.methods import diagnostics

K = 16


def one_hot(*indices):
  return jax.nn.one_hot(jnp.array(indices), K)


def test_sharp_and_even_targets():
  values = diagnostics.targets(one_hot(*range(K)))
  assert values["teacher_entropy"] == 0.0
  assert values["teacher_marginal_entropy"] == pytest.approx(math.log(K), rel=1e-6)
  assert values["prototype_usage"] == pytest.approx(1.0, rel=1e-6)


def test_collapsed_targets_use_one_prototype_and_crops_agree():
  values = diagnostics.targets(one_hot(3, 3, 3, 3))
  assert values["prototype_usage"] == pytest.approx(1 / K)
  assert values["crop_kl"] == 0.0


def test_divergence_is_that_of_the_two_crops_of_an_image():
  p, q = jnp.array([0.7, 0.2, 0.1]), jnp.array([0.1, 0.3, 0.6])
  expected = float(jnp.sum(p * jnp.log(p / q)) + jnp.sum(q * jnp.log(q / p))) / 2
  both_ways = diagnostics.targets(jnp.stack([p, q, q, p]))["crop_kl"]  # two images, crops side by side
  assert both_ways == pytest.approx(expected, rel=1e-6)
  assert diagnostics.targets(jnp.stack([p, p, q, q]))["crop_kl"] == 0.0


def test_features_all_alike_have_no_spread_and_isotropic_ones_have_all():
  same = diagnostics.features(jnp.ones((64, 8)))
  assert same["feature_std"] == pytest.approx(0.0, abs=1e-6)
  spread = diagnostics.features(jax.random.normal(jax.random.key(0), (4096, 8)))
  assert spread["feature_std"] == pytest.approx(1.0, rel=0.02) and spread["feature_rank"] == pytest.approx(8, rel=0.02)


def test_similarity_of_patches_with_each_other_and_the_class_token():
  rng = np.random.default_rng(0)
  patches, cls = rng.standard_normal((3, 5, 4)), rng.standard_normal((3, 4))
  got = diagnostics.similarity(jnp.asarray(cls, jnp.float32), jnp.asarray(patches, jnp.float32))
  unit = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
  matrices = np.einsum("bnd,bmd->bnm", unit, unit)
  among = (matrices.sum((1, 2)) - 5) / (5 * 4)
  with_cls = np.einsum("bnd,bd->bn", unit, cls / np.linalg.norm(cls, axis=-1, keepdims=True)).mean(1)
  np.testing.assert_allclose(got["patch_similarity"], among, atol=1e-6)
  np.testing.assert_allclose(got["patch_cls_similarity"], with_cls, atol=1e-6)
  alike = diagnostics.similarity(jnp.ones((1, 4)), jnp.ones((1, 5, 4)))
  assert alike["patch_similarity"][0] == pytest.approx(1.0) and alike["patch_cls_similarity"][0] == pytest.approx(1.0)


def test_metrics_of_health_have_no_gradient():
  x = jax.random.normal(jax.random.key(0), (4, 3, K))

  def total(x):
    rows = diagnostics.similarity(x[:, 0], x)
    parts = diagnostics.features(x[0]) | diagnostics.targets(jax.nn.softmax(x[0, :2])) | diagnostics.means(rows)
    return sum(parts.values())

  assert not np.any(jax.grad(total)(x))
