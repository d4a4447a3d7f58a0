"""Absolute positions, models without class or mask token, and what the feature of an image is pooled from."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from vit_jax import weights
from vit_jax.models import PositionTable, Rope, VisionTransformer, create_model
from vit_jax.models.position_table import sincos_positions

TABLE = np.sin(0.9 * np.arange(16) + 0.11 * np.arange(16) ** 1.5).astype(np.float32).reshape(16, 1)
# torch.nn.functional.interpolate(table, mode="bicubic") to 6 x 3: rows 0, 1 and 5.
RESIZED = {
  (0.0, False): [
    [0.2125811, 1.1048906, -0.0626693],
    [-0.4554236, 0.6343441, 0.447203],
    [0.188936, -0.950389, 0.6657131],
  ],
  (0.0, True): [
    [0.2836428, 0.9717854, 0.0632819],
    [-0.3532141, 0.5633822, 0.4926134],
    [0.0293894, -0.7921832, 0.5457372],
  ],
  (0.1, False): [
    [0.196006, 1.1076643, 0.0520045],
    [-0.4474908, 0.606338, 0.4978925],
    [0.2043683, -0.9703219, 0.5332255],
  ],
}


@functools.cache
def small(**overrides):
  base = dict(patch_size=8, width=32, depth=2, num_heads=2, num_registers=2, rope=None)
  model = VisionTransformer(**base | overrides)
  images = jax.random.normal(jax.random.key(1), (3, 24, 16, 3))
  variables = jax.jit(model.init)(jax.random.key(0), images)
  rng = np.random.default_rng(0)
  return model, images, jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), variables)


@pytest.mark.parametrize(("offset", "antialias"), RESIZED)
def test_learned_positions_are_resized_as_pytorch_does(offset, antialias):
  table = PositionTable((4, 4), offset=offset, antialias=antialias)
  resized = np.asarray(table.resize(jnp.asarray(TABLE), (6, 3))).reshape(6, 3)
  np.testing.assert_allclose(resized[[0, 1, 5]], RESIZED[offset, antialias], atol=2e-6)
  np.testing.assert_array_equal(table.resize(TABLE, (4, 4)), TABLE)


def test_sincos_positions_are_column_then_row_sines_and_cosines():
  positions = sincos_positions((3, 2), 8).reshape(
    3, 2, 2, 2, 2
  )  # row, column, (of column, of row), (sin, cos), frequency
  for row in range(3):
    for column in range(2):
      for axis, coordinate in enumerate((column, row)):
        for i, frequency in enumerate((1.0, 0.01)):
          angle = coordinate * frequency
          np.testing.assert_allclose(positions[row, column, axis, :, i], [np.sin(angle), np.cos(angle)], atol=1e-12)
  with pytest.raises(ValueError, match="multiple of 4, got 6"):
    sincos_positions((2, 2), 6)


@pytest.mark.parametrize(("prefix", "rows"), [("none", 6), ("cls", 7), ("all", 9)])
def test_positions_are_added_to_the_tokens_that_have_one(prefix, rows):
  model, images, variables = small(position_table=PositionTable((3, 2), prefix=prefix))
  table = variables["params"]["positions"]
  assert table.shape == (rows, 32)
  bare = {"params": {name: value for name, value in variables["params"].items() if name != "positions"}}
  tokens = model.apply(variables, images, None, method="_tokens")
  without = model.clone(position_table=None).apply(bare, images, None, method="_tokens")
  added = np.asarray(tokens - without)[0]
  front = rows - 6
  np.testing.assert_allclose(added[:front], table[:front], atol=1e-6)
  np.testing.assert_array_equal(added[front:3], 0)
  np.testing.assert_allclose(added[3:], table[front:], atol=1e-6)


def test_sincos_positions_need_no_parameter_and_tell_patches_apart():
  model, images, variables = small(position_table=PositionTable(kind="sincos", prefix="none"))
  assert "positions" not in variables["params"]
  turned = images[:, ::-1]
  assert np.max(np.abs(model.apply(variables, images).cls - model.apply(variables, turned).cls)) > 1e-3


def test_a_model_without_class_token_pools_its_patches():
  model, images, variables = small(class_token=False, pool="avg", position_table=PositionTable((3, 2)))
  assert "cls_token" not in variables["params"]
  assert variables["params"]["positions"].shape == (6, 32)
  features = model.apply(variables, images)
  assert features.registers.shape == (3, 2, 32) and features.patches.shape == (3, 6, 32)
  np.testing.assert_allclose(features.cls, features.patches.mean(1), atol=1e-6)
  crops = images[:, :16]
  both = model.apply(variables, [images, crops])
  np.testing.assert_allclose(both[1].cls, model.apply(variables, crops).cls, atol=1e-5)


def test_the_norm_of_the_pooled_feature_leaves_tokens_alone():
  model, images, variables = small(pool="avg", pool_norm=True)
  features = model.apply(variables, images)
  np.testing.assert_array_equal(features.patches, features.prenorm[:, 3:])
  norm = variables["params"]["final_norm"]
  pooled = np.asarray(features.patches.mean(1))
  centred = pooled - pooled.mean(-1, keepdims=True)
  expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + model.norm_eps) * norm["scale"] + norm["bias"]
  np.testing.assert_allclose(features.cls, expected, atol=1e-5)


def test_rotary_positions_go_with_average_pooling_and_registers():
  model, images, variables = small(class_token=False, pool="avg", rope=Rope())
  assert model.apply(variables, images).cls.shape == (3, 32)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (dict(class_token=False), "pool='cls': needs a class token"),
    (dict(pool="max"), "pool='max': must be one of cls, avg, map, distilled"),
    (dict(pool_norm=True, separate_cls_norm=True), "pool_norm=True: does not go with"),
  ],
)
def test_attributes_that_do_not_go_together_are_refused(overrides, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(VisionTransformer(**overrides).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  with pytest.raises(ValueError, match='prefix must be "none", "cls" or "all"'):
    PositionTable(prefix="some")


def test_masks_need_a_mask_token():
  model, images, variables = small(masking=False)
  assert "mask_token" not in variables["params"]
  with pytest.raises(ValueError, match="without a mask token: set masking=True"):
    model.apply(variables, images, masks=jnp.zeros((3, 6), bool))


def test_masked_patches_keep_their_positions():
  model, images, variables = small(position_table=PositionTable((3, 2)))
  masks = jnp.ones((3, 6), bool)
  patches = model.apply(variables, images, masks, method="_tokens")[:, 3:]
  expected = variables["params"]["mask_token"] + variables["params"]["positions"][1:]
  np.testing.assert_allclose(patches, np.broadcast_to(expected, patches.shape), atol=1e-6)


def test_attention_pooling_equals_siglips():
  """SigLIP's vision tower of Hugging Face, its tensors under timm's names."""
  golden = Golden("hf_siglip_vision")
  s, theirs = golden.settings, golden.under("sd")
  join = lambda *names: np.concatenate([theirs[name] for name in names])  # noqa: E731
  ours = {
    "pos_embed": theirs["embeddings.position_embedding.weight"][None],
    "patch_embed.proj.weight": theirs["embeddings.patch_embedding.weight"],
    "patch_embed.proj.bias": theirs["embeddings.patch_embedding.bias"],
    "attn_pool.latent": theirs["head.probe"],
  }
  for kind in ("weight", "bias"):
    for i in range(s["num_hidden_layers"]):
      a, b = f"encoder.layers.{i}", f"blocks.{i}"
      ours[f"{b}.attn.qkv.{kind}"] = join(*(f"{a}.self_attn.{letter}_proj.{kind}" for letter in "qkv"))
      ours[f"{b}.attn.proj.{kind}"] = theirs[f"{a}.self_attn.out_proj.{kind}"]
      for ours_name, their_name in (
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("mlp.fc1",) * 2,
        ("mlp.fc2",) * 2,
      ):
        ours[f"{b}.{ours_name}.{kind}"] = theirs[f"{a}.{their_name}.{kind}"]
    ours[f"norm.{kind}"] = theirs[f"post_layernorm.{kind}"]
    packed = theirs[f"head.attention.in_proj_{kind}"]
    ours[f"attn_pool.q.{kind}"], ours[f"attn_pool.kv.{kind}"] = np.split(packed, [s["hidden_size"]])
    ours[f"attn_pool.proj.{kind}"] = theirs[f"head.attention.out_proj.{kind}"]
    ours[f"attn_pool.norm.{kind}"] = theirs[f"head.layernorm.{kind}"]
    for layer in ("fc1", "fc2"):
      ours[f"attn_pool.mlp.{layer}.{kind}"] = theirs[f"head.mlp.{layer}.{kind}"]
  model = VisionTransformer(
    patch_size=8, width=48, depth=2, num_heads=4, mlp="gelu_tanh", mlp_hidden=96, class_token=False, masking=False,
    rope=None, position_table=PositionTable((4, 4)), pool="map",
  )  # fmt: skip
  variables = {"params": weights.from_state_dict(ours, model, "timm")}
  features = model.apply(variables, golden["pixel_values"].transpose(0, 2, 3, 1))
  np.testing.assert_allclose(features.patches, golden["last_hidden_state"], atol=1e-5)
  np.testing.assert_allclose(features.cls, golden["pooler_output"], atol=1e-5)


def test_plain_models_are_made_by_name_and_overrides():
  model = create_model("vit_s16", class_token=False, pool="avg", position_table=PositionTable(kind="sincos"))
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  assert not {"positions", "cls_token", "mask_token"} & set(params)
