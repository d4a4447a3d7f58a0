"""The ConvNeXt against the reference's features, and the calls it shares with the Vision Transformer."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from vit_jax import weights
from vit_jax.models import ConvNeXt, Draws

RELATIVE = 5e-6  # of the largest element; float32 against float32


def close(ours, theirs, relative=RELATIVE):
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * np.abs(theirs).max())


def channels_last(images):
  return jnp.asarray(images.transpose(0, 2, 3, 1))


@functools.cache
def case():
  golden = Golden("convnext_original")
  s = golden.settings
  model = ConvNeXt(depths=tuple(s["depths"]), widths=tuple(s["dims"]), patch_size=s["pseudo_patch_size"])
  return golden, model, {"params": weights.from_state_dict(golden.under("sd"), model)}, channels_last(golden["x"])


def test_features_equal_the_reference():
  golden, model, variables, images = case()
  features = jax.jit(model.apply)(variables, images)
  close(features.cls, golden["x_norm_clstoken"])
  close(features.patches, golden["x_norm_patchtokens"])
  close(features.prenorm, golden["x_prenorm"])
  assert features.registers.shape == (2, 0, model.width)
  assert features.patches.shape[1] == (64 // model.stride) * (96 // model.stride)


def test_intermediate_stages_equal_the_reference():
  golden, model, variables, images = case()
  outputs = model.apply(variables, images, layers=(0, 1, 2, -1), method="intermediate")
  for i, features in enumerate(outputs):
    close(features.patches, golden[f"intermediate/stage{i}/patches"])
    close(features.cls, golden[f"intermediate/stage{i}/pooled"])
  (raw,) = model.apply(variables, images, layers=(3,), norm=False, method="intermediate")
  np.testing.assert_array_equal(raw.patches, raw.prenorm)
  with pytest.raises(ValueError, match="distinct indices below depth 4"):
    model.apply(variables, images, layers=(4,), method="intermediate")


def test_features_equal_hugging_faces():
  golden = Golden("hf_dinov3_convnext")
  s = golden.settings
  model = ConvNeXt(depths=tuple(s["depths"]), widths=tuple(s["hidden_sizes"]), norm_eps=s["layer_norm_eps"])
  variables = {"params": weights.from_state_dict(golden.under("sd"), model, "hf_dinov3_convnext")}
  for size in ("64x64", "64x96"):
    images = channels_last(golden[f"{size}/pixel_values"])
    features = model.apply(variables, images)
    close(np.concatenate([features.cls[:, None], features.patches], axis=1), golden[f"{size}/last_hidden_state"])
    for i, stage in enumerate(model.apply(variables, images, layers=range(4), norm=False, method="intermediate")):
      want = channels_last(golden[f"{size}/hidden_states/{i + 1}"])
      close(stage.patches, np.asarray(want.reshape(2, -1, want.shape[-1])))


def test_a_list_gives_what_each_of_its_entries_gives_and_masks_change_nothing():
  _, model, variables, images = case()
  crops = images[:, :32, :64]
  together = model.apply(variables, [images, crops], masks=[jnp.ones((2, 6), bool), None])
  for features, entry in zip(together, (images, crops), strict=True):
    alone = model.apply(variables, entry)
    chex.assert_trees_all_close(features, alone, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="16x96 pixels are smaller than the stride of 32"):
    model.apply(variables, images[:, :16])


def test_unrolling_and_recomputation_change_nothing():
  _, model, variables, images = case()
  loss = lambda m: jax.jit(jax.value_and_grad(lambda v: jnp.sum(m.apply(v, images).cls ** 3)))  # noqa: E731
  value, grads = loss(model)(variables)
  same, same_grads = loss(model.clone(remat="blocks", unroll=2))(variables)
  np.testing.assert_allclose(same, value, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(same_grads), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(jnp.max(jnp.abs(b))), 1e-6))


def test_stochastic_depth_drops_whole_rows():
  _, model, variables, images = case()
  kept = Draws(kept=jnp.zeros((5, 2, 1, 1), jnp.int32))  # the first row keeps all branches, doubled; the second none
  features = model.apply(variables, images, train=True, draws=[kept])
  for row, factor in ((0, 2.0), (1, 0.0)):
    scaled = jax.tree.map(lambda x: x, variables)
    for i in range(4):
      scaled["params"][f"stage{i}"]["layers"]["ls"]["gamma"] *= factor
    close(features.cls[row], np.asarray(model.apply(scaled, images).cls[row]))
  random = model.clone(drop_path=0.5).apply(variables, images, train=True, rngs={"drop_path": jax.random.key(0)})
  assert np.max(np.abs(random.cls - model.apply(variables, images).cls)) > 1e-3


def test_bfloat16_compute_keeps_float32_parameters_and_is_close():
  _, model, variables, images = case()
  half = model.clone(dtype="bfloat16")
  shapes = jax.eval_shape(half.init, jax.random.key(0), images)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  features = half.apply(variables, images)
  assert features.cls.dtype == jnp.bfloat16
  np.testing.assert_allclose(features.cls, model.apply(variables, images).cls, atol=0.15)


def test_initial_values_have_the_reference_statistics():
  model = ConvNeXt(depths=(1, 1, 1, 1), widths=(64, 64, 64, 64))
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  layers = params["stage1"]["layers"]
  for kernel in (layers["dwconv"], layers["mlp"]["fc1"], layers["mlp"]["fc2"], params["downsample1"]["conv"]):
    np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02, rtol=0.05)
    assert not np.any(kernel["bias"])
  assert np.all(layers["ls"]["gamma"] == np.float32(1e-6))
