"""State dicts to parameters and back: exact, strict, and the same features as the libraries that made them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from tests.models.reference import reference_vit
from vit_jax import weights
from vit_jax.methods.architecture import differences
from vit_jax.models import ConvNeXt, ProjectionHead, Rope, VisionTransformer, create_model
from vit_jax.weights import WeightMismatch, WeightsError
from vit_jax.weights.families import family_of_config
from vit_jax.weights.hf_config import to_attributes, to_config
from vit_jax.weights.infer import infer_attributes, recognise

REFERENCE = [
  "vit_both_untied_rope_augmented",
  "vit_mlp_reg4_ls_kmask_nonsquare",
  "vit_rmsnorm_nobias",
  "vit_swiglu64_untie_globallocal",
  "vit_swiglu_reg4_untie_clspatch",
]


def small() -> tuple[VisionTransformer, dict[str, np.ndarray]]:
  golden = Golden("vit_mlp_reg4_ls_kmask_nonsquare")
  state_dict = golden.under("sd")
  return VisionTransformer(**infer_attributes(state_dict)), state_dict


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_backbones_round_trip_and_are_recognised(name: str):
  golden = Golden(name)
  state_dict = golden.under("sd")
  inferred = infer_attributes(state_dict)
  told = reference_vit(golden)
  for field in dataclasses.fields(told):
    if field.name in inferred and field.name not in ("norm_eps", "rope"):
      expected = getattr(told, field.name)
      assert inferred[field.name] == (expected and told.qkv_bias if field.name == "mask_k_bias" else expected), (
        field.name
      )
  for key in ("base", "min_period", "max_period"):
    assert np.allclose(getattr(inferred["rope"], key) or 0, getattr(told.rope, key) or 0, rtol=1e-6)
  model = VisionTransformer(**inferred)
  again = weights.to_state_dict(weights.from_state_dict(state_dict, model), model)
  assert again.keys() == state_dict.keys()
  for key, value in state_dict.items():
    assert again[key].shape == value.shape and again[key].flags.c_contiguous
    np.testing.assert_allclose(again[key], value, rtol=1e-6 if "periods" in key else 0, err_msg=key)


def test_a_file_of_the_7b_model_cannot_say_that_it_masks_a_bias_it_has_not():
  """Its maps of q, k and v have no bias, so that nothing in the file tells the published attribute."""
  model = create_model("dinov3_vit7b16", width=64, depth=1, num_heads=2, mlp_hidden=96)
  assert model.mask_k_bias and not model.qkv_bias
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  found = VisionTransformer(**infer_attributes(weights.to_state_dict(params, model)))
  assert differences(found, model) == ([], [])


@pytest.mark.parametrize(("name", "layers", "bias"), [("nl3", 3, True), ("nl1", 1, True), ("nl2_nobias", 2, False)])
def test_heads_round_trip_and_compute_the_same(name: str, layers: int, bias: bool):
  golden = Golden("dino_head")
  state_dict, s = golden.under(f"{name}/sd"), golden.settings[name]
  head = ProjectionHead(s["hidden_dim"], s["bottleneck_dim"], s["out_dim"], num_layers=layers, mlp_bias=bias)
  params = weights.from_state_dict(state_dict, head)
  scores = head.apply({"params": params}, golden[f"{name}/x"])
  np.testing.assert_allclose(scores, golden[f"{name}/out"], rtol=1e-4, atol=1e-5)
  again = weights.to_state_dict(params, head)
  assert again.keys() == state_dict.keys()
  assert all(np.array_equal(again[key], state_dict[key]) for key in again)


@pytest.mark.parametrize("name", ["hf_dinov3_vit_mlp", "hf_dinov3_vit_gated"])
def test_hugging_face_weights_give_hugging_faces_features(name: str):
  golden = Golden(name)
  state_dict, s = golden.under("sd"), golden.settings
  model = VisionTransformer(**to_attributes(s | {"model_type": "dinov3_vit"}))
  params = weights.from_state_dict(state_dict, model, "hf_dinov3")
  apply = jax.jit(model.apply)
  sizes = sorted({key.split("/")[0] for key in golden if key.endswith("pixel_values")})
  assert sizes
  for size in sizes:
    images = golden[f"{size}/pixel_values"].transpose(0, 2, 3, 1)
    for masks, key in ((None, "last_hidden_state"), (golden[f"{size}/bool_masked_pos"], "last_hidden_state_masked")):
      features = apply({"params": params}, images, masks=masks)
      tokens = jnp.concatenate([features.cls[:, None], features.registers, features.patches], axis=1)
      np.testing.assert_allclose(tokens, golden[f"{size}/{key}"], rtol=2e-4, atol=2e-5)
  again = weights.to_state_dict(params, model, "hf_dinov3")
  assert again.keys() == state_dict.keys()
  assert all(np.array_equal(again[key], state_dict[key]) for key in again)
  written = to_config(model, image_size=32)
  differing = {key for key, value in s.items() if key in written and written[key] != value}
  assert not differing and to_attributes(written) == to_attributes(s | {"model_type": "dinov3_vit"})


@pytest.mark.parametrize(
  ("name", "layout"), [("convnext_original", "dinov3"), ("hf_dinov3_convnext", "hf_dinov3_convnext")]
)
def test_convnexts_round_trip(name: str, layout: str):
  golden = Golden(name)
  state_dict = golden.under("sd")
  widths = golden.settings.get("dims") or golden.settings["hidden_sizes"]
  model = ConvNeXt(depths=tuple(golden.settings["depths"]), widths=tuple(widths))
  params = weights.from_state_dict(state_dict, model, layout)
  again = weights.to_state_dict(params, model, layout)
  assert again.keys() == state_dict.keys()
  assert all(np.array_equal(again[key], state_dict[key]) for key in again)
  with pytest.raises(WeightMismatch, match=r"missing: stages\.2\.(layers\.)?1\.gamma \(48,\)"):
    weights.from_state_dict({k: v for k, v in state_dict.items() if not k.endswith("1.gamma")}, model, layout)
  with pytest.raises(WeightsError, match="'hf_dinov3' does not hold a ConvNeXt; these do: dinov3, hf_dinov3_c"):
    weights.to_state_dict(params, model, "hf_dinov3")


def test_a_second_copy_of_a_tensor_may_be_absent_but_not_different():
  golden = Golden("convnext_original")
  state_dict = golden.under("sd")
  model = ConvNeXt(depths=tuple(golden.settings["depths"]), widths=tuple(golden.settings["dims"]))
  weights.from_state_dict({k: v for k, v in state_dict.items() if not k.startswith("norms.")}, model)
  with pytest.raises(WeightMismatch, match=r"norms\.3\.bias should repeat another tensor, norm\.bias, but differs"):
    weights.from_state_dict(state_dict | {"norms.3.bias": state_dict["norms.3.bias"] + 1}, model)


def test_one_error_lists_everything_that_does_not_fit():
  model, state_dict = small()
  wrong = dict(state_dict)
  del wrong["blocks.1.attn.proj.bias"]
  wrong["norm.weight"] = wrong["norm.weight"][:-1]
  wrong["mask_token"] = wrong["mask_token"].reshape(1, 1, -1)
  wrong["head.weight"] = np.zeros((10, 48))
  wrong["blocks.0.attn.qkv.bias_mask"] = np.full((144,), np.nan, np.float32)
  with pytest.raises(WeightMismatch) as caught:
    weights.from_state_dict(wrong, model)
  message = str(caught.value)
  for line in (
    "5 tensors",
    "missing: blocks.1.attn.proj.bias (48,)",
    "extra: head.weight (10, 48)",
    "shape: norm.weight is (47,), expected (48,)",
    "shape: mask_token is (1, 1, 48), expected (1, 48)",
    "value: blocks.0.attn.qkv.bias_mask[0] is nan, expected 1 (ones for query and value, zeros for key)",
  ):
    assert line in message


def test_another_depth_or_rope_is_an_error():
  model, state_dict = small()
  with pytest.raises(WeightMismatch, match=r"extra: blocks\.2\.norm1\.weight"):
    weights.from_state_dict(state_dict, model.clone(depth=2))
  with pytest.raises(WeightMismatch, match=r"missing: blocks\.3\.norm1\.weight"):
    weights.from_state_dict(state_dict, model.clone(depth=4))
  with pytest.raises(
    WeightMismatch, match=r"value: rope_embed\.periods\[2\] is 21\.5443, expected 46\.4159 \(the model's rope"
  ):
    weights.from_state_dict(state_dict, model.clone(rope=Rope(base=316.2278)))
  with pytest.raises(WeightMismatch, match=r"extra: blocks\.0\.attn\.qkv\.bias_mask"):
    weights.from_state_dict(state_dict, model.clone(mask_k_bias=False))


def test_buffers_may_be_absent_and_are_written():
  model, state_dict = small()
  bare = {key: value for key, value in state_dict.items() if not key.endswith(("periods", "bias_mask"))}
  params = weights.from_state_dict(bare, model)
  assert len(bare) == len(state_dict) - 4
  assert weights.to_state_dict(params, model).keys() == state_dict.keys()


def test_bfloat16_periods_are_accepted():
  model, state_dict = small()
  state_dict["rope_embed.periods"] = state_dict["rope_embed.periods"].astype(jnp.bfloat16)
  weights.from_state_dict(state_dict, model)
  assert infer_attributes(state_dict)["rope"].base == 100.0


def test_prefixes_are_selected_never_guessed():
  model, state_dict = small()
  export = {"teacher": {f"backbone.{k}": v for k, v in state_dict.items()} | {"dino_head.mlp.0.bias": np.zeros(3)}}
  with pytest.raises(WeightMismatch, match=r"(?s)extra: teacher \(a dict\).*select\(state_dict, 'teacher'\)"):
    weights.from_state_dict(export, model)
  teacher = weights.select(export, "teacher")
  with pytest.raises(WeightMismatch, match=r"select\(state_dict, 'backbone\.'\)"):
    weights.from_state_dict(teacher, model)
  assert weights.select(teacher, "backbone.").keys() == state_dict.keys()
  with pytest.raises(WeightsError, match="nothing under 'student.'; its names begin with backbone, dino_head"):
    weights.select(teacher, "student.")


def test_parameters_of_another_model_are_not_exported():
  model, state_dict = small()
  params = weights.from_state_dict(state_dict, model)
  del params["registers"]
  params["cls_token"] = params["cls_token"][:4]
  params["surplus"] = jnp.zeros(2)
  with pytest.raises(WeightMismatch) as caught:
    weights.to_state_dict(params, model)
  for line in ("missing: registers (4, 48)", "shape: cls_token is (4,), expected (48,)", "extra: surplus (2,)"):
    assert line in str(caught.value)


def test_what_a_layout_cannot_hold_is_named():
  golden = Golden("vit_swiglu_reg4_untie_clspatch")
  model = VisionTransformer(**infer_attributes(golden.under("sd")))
  params = weights.from_state_dict(golden.under("sd"), model)
  with pytest.raises(WeightMismatch, match=r"no place for cls_norm/bias, cls_norm/scale: .*format=\"pth\""):
    weights.to_state_dict(params, model, "hf_dinov3")
  with pytest.raises(WeightsError, match="no layout 'hf'; there are dinov3, dinov2, hf_dinov3"):
    weights.to_state_dict(params, model, "hf")
  with pytest.raises(
    WeightsError,
    match=r"separate_cls_norm=True \(.*; rope\.min_period and rope\.max_period .* format=\"pth\"",
  ):
    to_config(model, 32)


def test_float64_stays_float64(x64: None):
  golden = Golden("vit_float64")
  state_dict = golden.under("sd")
  model = VisionTransformer(**infer_attributes(state_dict))
  params = weights.from_state_dict(state_dict, model)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float64")}
  again = weights.to_state_dict(params, model)
  assert all(np.array_equal(again[key], state_dict[key]) for key in again if key != "rope_embed.periods")


def test_half_precision_files_become_the_parameter_type():
  model, state_dict = small()
  halves = {key: value.astype(jnp.bfloat16) for key, value in state_dict.items()}
  assert {leaf.dtype for leaf in jax.tree.leaves(weights.from_state_dict(halves, model))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", ["x", None])
def test_unknown_hugging_face_models_are_refused(kind: str | None):
  with pytest.raises(WeightsError, match=f"model_type {kind!r} is not known; dinov3_vit, dinov3_convnext, dinov2"):
    family_of_config({"model_type": kind})
  with pytest.raises(WeightsError, match="query_bias=True with value_bias=False; .*hidden_act='relu'"):
    to_attributes({"model_type": "dinov3_vit", "value_bias": False, "hidden_act": "relu"})


def test_other_names_are_not_taken_for_a_backbone():
  with pytest.raises(WeightsError, match=r"not a backbone of DINOv3, DINOv2 or timm: .*; it has fc\.weight"):
    recognise({"fc.weight": np.zeros((2, 2))})
