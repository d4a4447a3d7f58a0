"""DINOv2, ViT and timm weights: the features of the libraries that made them, and exact round trips."""

from __future__ import annotations

import dataclasses

import chex
import jax
import numpy as np
import pytest

from tests.golden import Golden
from vit_jax import weights
from vit_jax.models import PositionTable, Rope, VisionTransformer, create_model
from vit_jax.weights import WeightMismatch, WeightsError
from vit_jax.weights.families import FAMILIES
from vit_jax.weights.infer import recognise

RELATIVE = 2e-6  # of the largest element; float32 against float32

TIMM = dict(patch_size=8, width=48, depth=2, num_heads=4, mlp_hidden=96, masking=False)
TABLE = PositionTable((4, 4), antialias=True)
MODELS = {
  "timm_vit_token": VisionTransformer(**TIMM, rope=None, position_table=TABLE),
  "timm_vit_avg_fcnorm": VisionTransformer(**TIMM, rope=None, position_table=TABLE, pool="avg", pool_norm=True),
  "timm_vit_gap_noclass_prenorm": VisionTransformer(
    **TIMM,
    rope=None,
    position_table=TABLE,
    class_token=False,
    patch_bias=False,
    pre_norm=True,
    pool="avg",
    pool_norm=True,
  ),
  "timm_vit_reg_ls_qknorm": VisionTransformer(
    **TIMM,
    rope=None,
    position_table=PositionTable((4, 4), prefix="all", antialias=True),
    num_registers=4,
    layer_scale=1e-5,
    qk_norm=True,
  ),
  "timm_dinov3_eva": VisionTransformer(
    **TIMM, rope=Rope(), num_registers=4, layer_scale=1e-5, mask_k_bias=True, norm_eps=1e-5
  ),
}
HUGGING_FACE = {"hf_dinov2": "dinov2", "hf_dinov2_registers": "dinov2_with_registers", "hf_vit": "vit"}


def channels_last(images: np.ndarray) -> np.ndarray:
  return images.transpose(0, 2, 3, 1)


def tokens(features) -> np.ndarray:
  return np.concatenate([features.cls[:, None], features.registers, features.patches], axis=1)


def close(ours, theirs) -> None:
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=RELATIVE * np.abs(theirs).max())


def hugging_face(name: str) -> tuple[Golden, VisionTransformer, str]:
  golden = Golden(name)
  family = FAMILIES[HUGGING_FACE[name]]
  return (
    golden,
    VisionTransformer(**family.to_attributes(golden.settings | {"model_type": HUGGING_FACE[name]})),
    (family.layout),
  )


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_weights_give_hugging_faces_features(name: str):
  golden, model, layout = hugging_face(name)
  variables = {"params": weights.from_state_dict(golden.under("sd"), model, layout)}
  apply = jax.jit(model.apply)
  prefixes = [key.removesuffix("pixel_values") for key in golden if key.endswith("pixel_values")]
  assert len(prefixes) == 2  # the table's own grid, and another
  for prefix in prefixes:
    images = channels_last(golden[f"{prefix}pixel_values"])
    close(tokens(apply(variables, images)), golden[f"{prefix}last_hidden_state"])
  prefix = prefixes[0]
  layers = model.apply(
    variables, channels_last(golden[f"{prefix}pixel_values"]), layers=(0, 1), norm=False, method="intermediate"
  )
  for i, features in enumerate(layers, start=1):
    close(tokens(features), golden[f"{prefix}hidden_states/{i}"])


@pytest.mark.parametrize("name", MODELS)
def test_timm_weights_give_timms_features(name: str):
  golden, model = Golden(name), MODELS[name]
  variables = {"params": weights.from_state_dict(golden.under("sd"), model, "timm")}
  images = channels_last(golden["x"])
  features = jax.jit(model.apply)(variables, images)
  everything = features.prenorm if model.pool_norm else tokens(features)
  close(everything, golden["forward_features"])
  if "logits" in golden:
    close(features.cls, golden["pre_logits"])
    head = golden.under("sd")
    close(features.cls @ head["head.weight"].T + head["head.bias"], golden["logits"])
    layers = model.apply(variables, images, layers=(0, 1), norm=False, method="intermediate")
    for i, layer in enumerate(layers):
      want = golden[f"intermediate/block{i}"]
      if model.class_token:
        close(layer.prenorm, want)


@pytest.mark.parametrize("name", [*HUGGING_FACE, *MODELS])
def test_weights_round_trip(name: str):
  if name in MODELS:
    golden, model, layout = Golden(name), MODELS[name], "timm"
  else:
    golden, model, layout = hugging_face(name)
  state_dict = golden.under("sd")
  params = weights.from_state_dict(state_dict, model, layout)
  again = weights.to_state_dict(params, model, layout)
  beyond = {"head.weight", "head.bias", "pooler.dense.weight", "pooler.dense.bias"}
  assert again.keys() == state_dict.keys() - beyond
  assert all(np.array_equal(again[key], state_dict[key]) for key in again)
  with pytest.raises(WeightMismatch, match=r"extra: surplus \(2,\)"):
    weights.from_state_dict(state_dict | {"surplus": np.zeros(2)}, model, layout)


def random_params(model: VisionTransformer) -> dict:
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
  ("layout", "name"),
  [("hf_dinov2", "encoder.layer.1.mlp.weights_in.weight"), ("dinov2", "blocks.1.mlp.w12.weight")],
)
def test_packed_gates_are_unpacked_in_order(layout: str, name: str):
  model = VisionTransformer(
    patch_size=8, width=16, depth=2, num_heads=2, mlp="swiglu", mlp_hidden=24, layer_scale=1.0, rope=None,
    position_table=PositionTable((2, 2)),
  )  # fmt: skip
  params = random_params(model)
  state_dict = weights.to_state_dict(params, model, layout)
  mlp = params["blocks"]["mlp"]
  np.testing.assert_array_equal(
    state_dict[name], np.concatenate([mlp["gate"]["kernel"][1].T, mlp["up"]["kernel"][1].T])
  )
  again = weights.from_state_dict(state_dict, model, layout)
  chex.assert_trees_all_equal(again, params)


def test_a_distillation_token_has_its_own_names_and_a_position():
  model = VisionTransformer(
    patch_size=8, width=16, depth=1, num_heads=2, masking=False, rope=None, num_registers=1, pool="distilled",
    position_table=PositionTable((2, 2), prefix="all"),
  )  # fmt: skip
  params = random_params(model)
  for layout, name, table in (
    ("timm", "dist_token", "pos_embed"),
    ("hf_vit", "embeddings.distillation_token", "embeddings.position_embeddings"),
  ):
    state_dict = weights.to_state_dict(params, model, layout)
    np.testing.assert_array_equal(state_dict[name], params["registers"][None])
    assert state_dict[table].shape == (1, 2 + 4, 16)
    heads = {"timm": ("head", "head_dist"), "hf_vit": ("cls_classifier", "distillation_classifier")}[layout]
    classifiers = {f"{head}.weight": np.zeros((10, 16), np.float32) for head in heads}
    again = weights.from_state_dict(state_dict | classifiers, model, layout)
    chex.assert_trees_all_equal(again, params)


def test_what_timm_cannot_hold_is_named():
  eva = MODELS["timm_dinov3_eva"].clone(mask_k_bias=False, masking=True)
  with pytest.raises(WeightMismatch, match="no place for blocks/attn/qkv/bias, mask_token"):
    weights.to_state_dict(random_params(eva), eva, "timm")


@pytest.mark.parametrize(
  ("kind", "config", "message"),
  [
    ("dinov2", {"hidden_act": "relu"}, r"hidden_act='relu' \(only 'gelu'\)"),
    ("vit", {"hidden_act": "relu", "patch_size": [16, 8]}, "hidden_act='relu'"),
    ("vit", {"patch_size": [16, 8]}, r"patch_size=\[16, 8\]"),
  ],
)
def test_settings_without_counterpart_are_named(kind: str, config: dict, message: str):
  with pytest.raises(WeightsError, match=message):
    FAMILIES[kind].to_attributes(config | {"model_type": kind, "image_size": 32})


def test_models_that_hugging_face_cannot_express_are_refused_by_attribute():
  model = MODELS["timm_vit_reg_ls_qknorm"]
  with pytest.raises(WeightsError) as caught:
    FAMILIES["dinov2_with_registers"].to_config(model.clone(mlp_hidden=100), 32)
  for words in ("DINOv2 cannot", "qk_norm=True (only False)", "position_table.prefix='all' (only 'cls')",
                "masking=False with registers", "mlp_hidden=100 (its mlp_ratio is a whole number)"):  # fmt: skip
    assert words in str(caught.value)
  with pytest.raises(WeightsError, match=r"ViT cannot express .*num_registers=4 \(only 0\).*layer_scale=1e-05"):
    FAMILIES["vit"].to_config(model, 32)


@pytest.mark.parametrize(
  ("name", "layout"),
  [
    ("dinov2_vits14", "dinov2"),
    ("dinov2_vits14_reg", "dinov2"),
    ("vit_ti16", "timm"),
    ("vit_h14", "timm"),
    ("deit_s16_distilled", "timm"),
    ("dinov3_vits16plus", "timm"),
    ("dinov3_convnext_tiny", "dinov3"),
  ],
)
def test_published_models_are_recognised_by_their_tensors(name: str, layout: str):
  model = create_model(name)
  if layout == "timm":
    table = model.position_table and dataclasses.replace(model.position_table, antialias=True)
    model = model.clone(depth=1, masking=False, position_table=table)
  elif layout == "dinov2":
    model = model.clone(depth=1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float16), shapes)
  found = recognise(weights.to_state_dict(params, model, layout))
  assert found.layout == layout
  assert found.module(**found.attributes) == model
