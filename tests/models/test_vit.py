"""The Vision Transformer against the reference's features, and its own invariances."""

from __future__ import annotations

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from tests.models.reference import reference_vit
from tests.models.sizes import PARAMETERS
from vit_jax import weights
from vit_jax.models import MODELS, Draws, Features, Rope, VisionTransformer, create_model, list_models
from vit_jax.models.blocks import add_branch, draw_kept, kept_rows
from vit_jax.models.positions import RopeDraws

CASES = [
  "vit_both_untied_rope_augmented",
  "vit_mlp_reg4_ls_kmask_nonsquare",
  "vit_plain_mlp",
  "vit_rmsnorm_nobias",
  "vit_rope_bf16",
  "vit_stochastic_depth",
  "vit_swiglu64_untie_globallocal",
  "vit_swiglu_reg4_untie_clspatch",
]
NAMES = {
  "x_norm_clstoken": "cls",
  "x_storage_tokens": "registers",
  "x_norm_patchtokens": "patches",
  "x_prenorm": "prenorm",
}
RELATIVE = 2e-6  # of the largest element; float32 against float32


def build(golden, **overrides):
  model = reference_vit(golden, **overrides)
  return model, {"params": weights.from_state_dict(golden.under("sd"), model)}


def channels_last(images):
  return jnp.asarray(images.transpose(0, 2, 3, 1))


def assert_features(features, golden, prefix, *, relative=RELATIVE):
  compared = 0
  for theirs, ours in NAMES.items():
    want = golden.get(f"{prefix}/{theirs}")
    if want is not None and want.size:
      np.testing.assert_allclose(
        getattr(features, ours), want, rtol=0, atol=relative * np.abs(want).max(), err_msg=f"{prefix}/{theirs}"
      )
      compared += 1
  return compared


@functools.cache
def case(name):
  golden = Golden(name)
  model, variables = build(golden)
  return golden, model, variables, channels_last(golden["x"])


@pytest.mark.parametrize("name", CASES)
def test_features_equal_the_reference(name):
  golden, model, variables, images = case(name)
  assert assert_features(jax.jit(model.apply)(variables, images), golden, "eval") >= 3
  if "masks" in golden:
    masked = jax.jit(functools.partial(model.apply))(variables, images, masks=jnp.asarray(golden["masks"]))
    assert assert_features(masked, golden, "eval_masked") >= 3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("norm", [True, False])
def test_intermediate_layers_equal_the_reference(name, norm):
  golden, model, variables, images = case(name)
  blocks = golden.under("intermediate/" + ("normed" if norm else "raw"))
  layers = sorted(int(key.removeprefix("block")) for key in blocks)
  outputs = model.apply(variables, images, layers=layers, norm=norm, method="intermediate")
  assert len(outputs) == len(layers) > 0
  for layer, features in zip(layers, outputs, strict=True):
    tokens = np.concatenate([features.cls[:, None], features.registers, features.patches], axis=1)
    want = blocks[f"block{layer}"]
    np.testing.assert_allclose(tokens, want, rtol=0, atol=RELATIVE * np.abs(want).max())


def reference_draws(golden, entry):
  """The recorded draws of one list entry: 0 global, 1 local."""
  kept = golden.get(f"stochastic_depth/{('global', 'local')[entry]}")
  rope = {key: jnp.asarray(value[:, entry])[:, None] for key, value in golden.under("rope_draws").items()}
  return Draws(kept=None if kept is None else jnp.asarray(kept)[:, :, None], rope=RopeDraws(**rope) if rope else None)


@pytest.mark.parametrize("name", [name for name in CASES if "x_local" in Golden(name)])
def test_training_on_two_resolutions_equals_the_reference(name):
  golden, model, variables, images = case(name)
  masks = jnp.asarray(golden["masks"]) if "masks" in golden else None
  outputs = model.apply(
    variables,
    [images, channels_last(golden["x_local"])],
    masks=[masks, None],
    train=True,
    draws=[reference_draws(golden, 0), reference_draws(golden, 1)],
  )
  assert assert_features(outputs[0], golden, "train_global") >= 3
  assert assert_features(outputs[1], golden, "train_local") >= 3


def test_features_in_float64_equal_the_reference(x64):
  golden = Golden("vit_float64")
  model, variables = build(golden)
  images = channels_last(golden["x"])
  assert assert_features(model.apply(variables, images), golden, "eval", relative=1e-12) >= 3
  masked = model.apply(variables, images, masks=jnp.asarray(golden["masks"]))
  assert assert_features(masked, golden, "eval_masked", relative=1e-12) >= 3


@pytest.mark.parametrize("name", sorted(MODELS))
def test_parameter_counts_are_the_published_ones(name):
  params = jax.eval_shape(create_model(name).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


def test_unknown_names_and_attributes_name_the_nearest():
  with pytest.raises(ValueError, match="dinov3_vits16"):
    create_model("dinov3_vit_s16")
  with pytest.raises(ValueError, match="num_heads"):
    create_model("vit_small", num_head=3)


@functools.cache
def small(**overrides):
  model = VisionTransformer(
    **dict(patch_size=8, width=32, depth=3, num_heads=2, num_registers=2, layer_scale=0.3) | overrides
  )
  images = jax.random.normal(jax.random.key(1), (6, 24, 24, 3))
  return model, images, jax.jit(model.init)(jax.random.key(0), images)


def test_unrolling_and_recomputation_change_nothing():
  model, images, variables = small()
  loss = lambda m: jax.jit(jax.value_and_grad(lambda v: jnp.sum(m.apply(v, images).cls ** 3)))  # noqa: E731
  value, grads = loss(model)(variables)
  others = [model.clone(unroll=3), model.clone(remat="dots", unroll=2)]
  for other in others + [model.clone(remat=remat) for remat in ("blocks", "attention", "offload")]:
    same, same_grads = loss(other)(variables)
    np.testing.assert_allclose(same, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(same_grads), jax.tree.leaves(grads), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(float(jnp.max(jnp.abs(b))), 1e-6))


def test_a_list_gives_what_each_of_its_entries_gives():
  model, images, variables = small()
  crops = images[:4, :16, :16]
  together = model.apply(variables, [images, crops])
  for features, entry in zip(together, (images, crops), strict=True):
    alone = model.apply(variables, entry)
    chex.assert_trees_all_close(features, alone, rtol=1e-5, atol=1e-6)


def test_the_key_bias_has_no_effect_and_no_gradient_even_if_it_is_nan():
  model, images, variables = small(mask_k_bias=True)
  bias = variables["params"]["blocks"]["attn"]["qkv"]["bias"]
  poisoned = jax.tree.map(lambda x: x, variables)
  poisoned["params"]["blocks"]["attn"]["qkv"]["bias"] = bias.at[:, 1].set(jnp.nan)
  value, grads = jax.value_and_grad(lambda v: jnp.sum(model.apply(v, images).cls ** 2))(poisoned)
  np.testing.assert_array_equal(value, jnp.sum(model.apply(variables, images).cls ** 2))
  assert not np.any(grads["params"]["blocks"]["attn"]["qkv"]["bias"][:, 1])


def test_what_are_no_images_of_the_model_is_said():
  model, images, variables = small()
  patch, height, width = model.patch_size, *images.shape[1:3]
  padded = jnp.pad(images, ((0, 0), (0, 5), (0, 3), (0, 0)))
  wrong = {
    rf"{height + 5}x{width + 3} pixels are no whole patches of {patch}: .* as {height}x{width}": padded,
    "smaller than one patch": images[:, :4],
    r"of shape \[\d+, \d+, 3\]\. A batch of one image: images\[None\]": images[0],
    r"must be \[batch, height, width, channels\], got an array of shape \[1, ": images[None],
    r"channels first: give it images\.transpose\(0, 2, 3, 1\)": images.transpose(0, 3, 1, 2),
    "the images have 4 channels and the model takes 3": jnp.pad(images, ((0, 0),) * 3 + ((0, 1),)),
    "normalised floats": (images * 0).astype(jnp.uint8),
  }
  for message, batch in wrong.items():
    for given in (batch, [images, batch]):
      with pytest.raises(ValueError, match=message):
        model.apply(variables, given)
    with pytest.raises(ValueError, match=message):
      model.apply(variables, batch, layers=(0,), method="intermediate")


def test_features_are_shown_by_their_shapes():
  model, images, variables = small()
  shown = repr(model.apply(variables, images))
  assert re.fullmatch(
    r"Features\(cls=float32\[\d+, \d+\], registers=float32\[(\d+, ){2}\d+\], patches=float32\[(\d+, ){2}\d+\], "
    r"prenorm=float32\[(\d+, ){2}\d+\]\)",
    shown,
  )
  assert repr(Features(cls=None, registers=1, patches="x", prenorm=jnp.zeros(3, jnp.bfloat16))) == (
    "Features(cls=None, registers=1, patches='x', prenorm=bfloat16[3])"
  )


def test_models_are_listed_by_a_pattern():
  assert set(list_models()) == set(MODELS) and list_models() == sorted(MODELS)
  assert list_models("dinov3_convnext_*") == [f"dinov3_convnext_{size}" for size in ("base", "large", "small", "tiny")]
  assert list_models("resnet*") == []


def test_stochastic_depth_keeps_an_exact_count_in_every_group():
  assert [kept_rows(b, p) for b, p in ((32, 0.4), (128, 0.4), (128, 0.3), (512, 0.3), (1, 0.9))] == [19, 76, 89, 358, 1]
  kept = draw_kept(jax.random.key(0), depth=4, groups=3, rows=10, rate=0.35)
  assert kept.shape == (4, 2, 3, 6)
  assert all(len(set(rows)) == 6 for rows in np.asarray(kept).reshape(-1, 6).tolist())
  assert len({tuple(sorted(rows)) for rows in np.asarray(kept).reshape(-1, 6).tolist()}) > 12


def test_stochastic_depth_skips_the_compute_of_dropped_rows():
  seen = []

  def branch(xs):
    seen.append(xs[0].shape[0])
    return (jnp.ones_like(xs[0]),)

  (y,) = add_branch((jnp.zeros((8, 2, 4)),), branch, (jnp.array([[0, 2], [1, 3]]),))
  assert seen == [4]
  np.testing.assert_array_equal(y[:, 0, 0], [2, 0, 2, 0, 0, 2, 0, 2])


def test_training_draws_from_the_keys_and_evaluation_does_not():
  model, images, variables = small(drop_path=0.5, rope=Rope(rescale=2.0, shift=0.2, jitter=1.5))
  rngs = lambda seed: {"drop_path": jax.random.key(seed), "rope": jax.random.key(seed)}  # noqa: E731
  apply = jax.jit(lambda seed: model.apply(variables, images, train=True, groups=2, rngs=rngs(seed)).cls)
  np.testing.assert_array_equal(apply(1), apply(1))
  assert np.max(np.abs(apply(1) - apply(2))) > 1e-3
  np.testing.assert_array_equal(model.apply(variables, images).cls, model.apply(variables, images).cls)
  with pytest.raises(ValueError, match="loss groups"):
    model.apply(variables, images, train=True, groups=4, rngs=rngs(0))


def test_every_loss_group_has_positions_of_its_own():
  """As every rank of the reference: one draw for a batch of thousands would move all of them the same way."""
  model, images, variables = small(rope=Rope(rescale=2.0))
  images = jnp.tile(images[:1], (6, 1, 1, 1))
  cls = model.apply(variables, images, train=True, groups=3, rngs={"rope": jax.random.key(0)}).cls
  np.testing.assert_array_equal(cls[::2], cls[1::2])
  assert all(jnp.max(jnp.abs(cls[a] - cls[b])) > 1e-3 for a, b in ((0, 2), (2, 4), (4, 0)))


def test_bfloat16_compute_keeps_float32_parameters_and_is_close():
  model, images, variables = small()
  half = model.clone(dtype="bfloat16")
  shapes = jax.eval_shape(half.init, jax.random.key(0), images)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  features, exact = half.apply(variables, images), model.apply(variables, images)
  assert features.cls.dtype == jnp.bfloat16
  np.testing.assert_allclose(features.cls, exact.cls, atol=0.05)


def test_initial_values_have_the_reference_statistics():
  model = create_model("dinov3_vits16", depth=2)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  blocks, bound = params["blocks"], math.sqrt(1 / 768)
  for kernel in (blocks["attn"]["qkv"], blocks["attn"]["proj"], blocks["mlp"]["fc1"], blocks["mlp"]["fc2"]):
    np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02, rtol=0.02)
    assert not np.any(kernel["bias"])
  assert not np.array_equal(blocks["mlp"]["fc1"]["kernel"][0], blocks["mlp"]["fc1"]["kernel"][1])
  for leaf in (params["patch_embed"]["kernel"], params["patch_embed"]["bias"]):
    assert np.max(np.abs(leaf)) <= bound
    np.testing.assert_allclose(np.std(leaf), bound / math.sqrt(3), rtol=0.1)
  np.testing.assert_allclose(np.std(params["registers"]), 0.02, rtol=0.1)
  assert not np.any(params["mask_token"])
  assert np.all(blocks["ls1"]["gamma"] == np.float32(1e-5))
  assert np.all(blocks["norm1"]["scale"] == 1) and not np.any(params["final_norm"]["bias"])
