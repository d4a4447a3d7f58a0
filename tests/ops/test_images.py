"""Images as models take them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_jax.models import VisionTransformer
from vit_jax.models.inputs import prepare_images
from vit_jax.ops.images import grey, normalize_images

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), np.uint8)


def test_grey_is_that_of_pil():
  expected = [np.asarray(Image.fromarray(image).convert("L")) for image in IMAGES]
  np.testing.assert_array_equal(np.asarray(grey(jnp.asarray(IMAGES)))[..., 0], expected)


def test_channels_are_normalised_by_their_own_mean_and_std():
  mean, std = (0.5, 0.4, 0.1), (0.2, 0.3, 0.9)
  expected = (IMAGES / 255.0 - np.array(mean)) / np.array(std)
  np.testing.assert_allclose(normalize_images(jnp.asarray(IMAGES), mean, std), expected, atol=1e-5)
  one = normalize_images(jnp.asarray(IMAGES), (0.5,), (0.2,))
  assert one.shape == (2, 8, 6, 1)
  np.testing.assert_allclose(one, (np.asarray(grey(jnp.asarray(IMAGES))) / 255.0 - 0.5) / 0.2, atol=1e-5)
  five = np.concatenate([IMAGES, IMAGES[..., :2]], axis=-1)
  np.testing.assert_allclose(normalize_images(jnp.asarray(five), (0.5,) * 5, (0.2,) * 5), (five / 255.0 - 0.5) / 0.2,
                             atol=1e-5)  # fmt: skip


def test_mean_and_std_of_other_channels_are_refused():
  with pytest.raises(ValueError, match=r"augment.mean=\(0.5, 0.5\): .* each of the 3 channels"):
    normalize_images(jnp.asarray(IMAGES), (0.5, 0.5), (0.2, 0.2))
  with pytest.raises(ValueError, match=r"augment.mean=\(0.5,\): .* each of the 5 channels"):
    normalize_images(jnp.zeros((1, 2, 2, 5), jnp.uint8), (0.5,), (0.2,))
  with pytest.raises(ValueError, match="not those of a model that takes 1 channels"):
    prepare_images(VisionTransformer(in_channels=1), jnp.asarray(IMAGES), (0.5,) * 3, (0.2,) * 3)
