"""Opening and saving models in every format, and what `import vit_jax` costs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax import config, hub, methods, weights
from vit_jax.checkpoints import Checkpoints, NotSaved
from vit_jax.data.framing import standard
from vit_jax.models import ConvNeXt, PositionTable, Rope, VisionTransformer
from vit_jax.weights import WeightsError
from vit_jax.weights.files import INDEX, SINGLE, read_safetensors, write_safetensors
from vit_jax.weights.pth import write_pth

SMALL = dict(patch_size=8, width=32, depth=2, num_heads=2, num_registers=2, layer_scale=1.0, norm_eps=1e-5)
MODELS = {  # the published kinds, small
  "vits": VisionTransformer(**SMALL, mask_k_bias=True, rope=Rope(rescale=2.0)),
  "vits_plus": VisionTransformer(**SMALL, mask_k_bias=True, mlp="swiglu", mlp_hidden=48, rope=Rope(rescale=2.0)),
  "vit7b": VisionTransformer(
    **SMALL, qkv_bias=False, mlp="swiglu", mlp_hidden=64, separate_local_cls_norm=True, rope=Rope(rescale=2.0)
  ),
  "no_registers": VisionTransformer(**(SMALL | {"num_registers": 0}), mask_k_bias=True, rope=Rope(rescale=2.0)),
  "free_key_bias": VisionTransformer(**SMALL, proj_bias=False, mlp_bias=False, rope=Rope(base=50.0)),
}
PLAIN = dict(patch_size=8, width=32, depth=2, num_heads=2, rope=None)
OTHERS = {  # the other families, small
  "convnext": ConvNeXt(depths=(1, 1, 2, 1), widths=(8, 16, 16, 24)),
  "dinov2": VisionTransformer(**PLAIN, layer_scale=1.0, position_table=PositionTable((3, 3))),
  "dinov2_swiglu": VisionTransformer(
    **PLAIN, layer_scale=1.0, position_table=PositionTable((3, 3)), mlp="swiglu", mlp_hidden=88
  ),
  "dinov2_reg": VisionTransformer(
    **PLAIN, layer_scale=1.0, position_table=PositionTable((3, 3), antialias=True), num_registers=2
  ),
  "dinov2_reg_of_none": VisionTransformer(
    **PLAIN, layer_scale=1.0, position_table=PositionTable((3, 3), antialias=True)
  ),
  "vit": VisionTransformer(**PLAIN, masking=False, position_table=PositionTable((3, 3))),
  "deit": VisionTransformer(
    **PLAIN, masking=False, num_registers=1, position_table=PositionTable((3, 3), prefix="all"), pool="distilled"
  ),
}
FORMATS = {  # besides orbax, which holds everything
  "convnext": ("safetensors", "pth"),
  "dinov2": ("safetensors", "pth", "timm"),
  "dinov2_swiglu": ("safetensors", "pth", "timm"),
  "dinov2_reg": ("safetensors", "pth", "timm"),
  "dinov2_reg_of_none": ("safetensors", "pth", "timm"),
  "vit": ("safetensors", "timm"),
  "deit": ("safetensors", "timm"),
}
ANYTHING = VisionTransformer(
  **(SMALL | {"layer_scale": None}), norm="rmsnorm", separate_cls_norm=True, rope=None, dtype=jnp.bfloat16
)


def random_params(model: VisionTransformer | ConvNeXt, seed: int = 0) -> dict:
  """Parameters of which every one influences the features."""
  size = 2 * model.stride
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, model.in_channels)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.5, leaf.shape), leaf.dtype), variables["params"])


def without_unused(model: VisionTransformer, params: dict) -> dict:
  """The parameters as a Hugging Face file holds them: without what has no influence on features."""
  params = {name: value for name, value in params.items() if name != "local_cls_norm"}
  if not isinstance(model, ConvNeXt) and model.mask_k_bias and model.qkv_bias:
    params["blocks"]["attn"]["qkv"]["bias"] = params["blocks"]["attn"]["qkv"]["bias"].at[:, 1].set(0)
  return params


def with_both_tokens(model: VisionTransformer | ConvNeXt) -> VisionTransformer | ConvNeXt:
  """A distilled DeiT that does not take the mean of its two tokens; others as they are."""
  return model.clone(pool="cls") if getattr(model, "pool", "cls") == "distilled" else model


def images(seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(2, 32, 24, 3)).astype(np.float32)


def assert_same(a: dict, b: dict) -> None:
  chex.assert_trees_all_equal(a, b)


@pytest.mark.parametrize("format", ["safetensors", "pth", "orbax"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_loaded_exactly(tmp_path: pathlib.Path, name: str, format: str):
  model, params = MODELS[name], random_params(MODELS[name])
  path = tmp_path / "models" / "mine"
  vit_jax.save_model(path, model, params, format=format)
  loaded, again = vit_jax.load_model(path)
  assert_same(again, without_unused(model, params) if format == "safetensors" else params)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again))
  kept = ("patch_size", "width", "depth", "num_heads", "mlp", "num_registers", "qkv_bias", "proj_bias", "mlp_bias")
  for key in kept + ("norm_eps",):
    assert getattr(loaded, key) == getattr(model, key)
  assert loaded.rope.base == model.rope.base
  if format == "orbax":
    assert loaded == model


@pytest.mark.parametrize(
  ("name", "format"), [(name, format) for name in FORMATS for format in (*FORMATS[name], "orbax")]
)
def test_the_other_families_are_loaded_as_they_were_saved(tmp_path: pathlib.Path, name: str, format: str):
  model, params = OTHERS[name], random_params(OTHERS[name])
  path = tmp_path / {"timm": "m.safetensors", "pth": "m.pth"}.get(format, "m")
  vit_jax.save_model(path, model, params, format=format)
  known = {} if isinstance(model, ConvNeXt) else {"num_heads": 2}  # which leave no trace in some formats
  loaded, again = vit_jax.load_model(path, **known)
  kept = dict(params)
  if format == "timm":
    kept.pop("mask_token", None)
  if (name, format) == ("dinov2_reg", "timm"):  # which has positions of all tokens before the patches, or of none
    np.testing.assert_array_equal(again["cls_token"], kept.pop("cls_token") + kept["positions"][0])
    np.testing.assert_array_equal(again["positions"], kept.pop("positions")[1:])
    kept |= {name: again[name] for name in ("cls_token", "positions")}
  assert_same(again, kept)
  if format in ("safetensors", "orbax"):
    assert loaded == model.clone(mlp_hidden=loaded.mlp_hidden) if hasattr(model, "mlp_hidden") else loaded == model
  if not isinstance(model, ConvNeXt):
    size = jnp.zeros((1, 24, 24, 3))  # the table's own grid: how it is resized is no matter of tensors
    np.testing.assert_array_equal(loaded.apply({"params": again}, size).cls, model.apply({"params": params}, size).cls)


def test_formats_that_need_a_mask_token_get_one(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  model = OTHERS["dinov2"].clone(masking=False)
  params = random_params(model)
  with caplog.at_level(logging.INFO):
    vit_jax.save_model(tmp_path / "m.pth", model, params, format="pth")
    loaded, again = vit_jax.load_model(tmp_path / "m.pth", num_heads=2)
  assert "a mask token of zeros" in caplog.text
  assert not np.any(again.pop("mask_token"))
  assert_same(again, params)
  assert loaded.masking


def test_a_timm_file_is_named_as_one(tmp_path: pathlib.Path):
  with pytest.raises(hub.UnknownModel, match=r"named …safetensors: m\.safetensors"):
    vit_jax.save_model(tmp_path / "m", OTHERS["vit"], random_params(OTHERS["vit"]), format="timm")


def test_a_model_with_a_classifier_is_opened_without_it(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  model, params = OTHERS["vit"], random_params(OTHERS["vit"])
  vit_jax.save_model(tmp_path, model, params)
  tensors = {f"vit.{name}": value for name, value in read_safetensors(tmp_path).items()}
  write_safetensors(tmp_path / SINGLE, tensors | {"classifier.weight": np.zeros((3, 32), np.float32)})
  with caplog.at_level(logging.INFO):
    assert_same(vit_jax.load_model(tmp_path)[1], params)
  assert "not loaded: classifier" in caplog.text


def test_the_own_format_holds_any_model(tmp_path: pathlib.Path):
  model = ANYTHING.clone(param_dtype=jnp.bfloat16)
  params = random_params(model)
  vit_jax.save_model(tmp_path / "m", model, params, format="orbax")
  loaded, again = vit_jax.load_model(tmp_path / "m")
  assert_same(again, params)
  assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype("bfloat16")}
  assert loaded == model


def test_what_hugging_face_cannot_express_is_named_and_nothing_is_written(tmp_path: pathlib.Path):
  with pytest.raises(WeightsError) as caught:
    vit_jax.save_model(tmp_path / "m", ANYTHING, random_params(ANYTHING))
  for word in ("norm='rmsnorm'", "separate_cls_norm=True", "layer_scale=None", "rope=None", 'format="orbax"'):
    assert word in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_exports_replace_exports_and_nothing_else(tmp_path: pathlib.Path):
  model, path = MODELS["vits"], tmp_path / "m"
  vit_jax.save_model(path, model, random_params(model, 0), mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32)
  preprocessor = json.loads((path / "preprocessor_config.json").read_text())
  assert preprocessor["image_mean"] == [0.5] * 3 and preprocessor["crop_size"] == {"height": 32, "width": 32}
  vit_jax.save_model(path, model, random_params(model, 1))
  assert_same(vit_jax.load_model(path)[1], without_unused(model, random_params(model, 1)))
  assert sorted(os.listdir(path)) == ["config.json", SINGLE] and os.listdir(tmp_path) == ["m"]
  (path / "thesis.tex").write_text("years of work")
  with pytest.raises(hub.UnknownModel, match=r"holds other things .*\(thesis\.tex\)"):
    vit_jax.save_model(path, model, random_params(model))
  with pytest.raises(hub.UnknownModel, match="is a folder"):
    vit_jax.save_model(path, model, random_params(model), format="pth")
  assert (path / "thesis.tex").exists()


def test_a_file_that_is_no_export_is_replaced_on_demand_only(tmp_path: pathlib.Path):
  model, path = MODELS["vits"], tmp_path / "thesis.pth"
  params = random_params(model)
  path.write_text("years of work")
  with pytest.raises(
    hub.UnknownModel, match=r"thesis\.pth is there and no export of vit_jax in format 'pth': .*--over"
  ):
    vit_jax.save_model(path, model, params, "pth")
  assert path.read_text() == "years of work"
  vit_jax.save_model(path, model, params, "pth", overwrite=True)
  vit_jax.save_model(path, model, random_params(model, 1), "pth")  # an earlier export, by now
  assert_same(vit_jax.load_model(path)[1], random_params(model, 1))
  foreign = tmp_path / "theirs.safetensors"
  write_safetensors(foreign, {"x": np.zeros(1)})
  with pytest.raises(hub.UnknownModel, match=r"theirs\.safetensors is there and no export"):
    vit_jax.save_model(foreign, OTHERS["vit"], random_params(OTHERS["vit"]), "timm")


def test_a_folder_keeps_its_format_and_is_not_named_as_a_file(tmp_path: pathlib.Path):
  model, path = MODELS["vits"], tmp_path / "m"
  params = random_params(model)
  vit_jax.save_model(path, model, params)
  with pytest.raises(hub.UnknownModel, match=r"in another format than 'orbax' \(it has config\.json\)"):
    vit_jax.save_model(path, model, params, "orbax")
  vit_jax.save_model(path, model, params, "orbax", overwrite=True)
  assert vit_jax.load_model(path)[0] == model
  with pytest.raises(
    hub.UnknownModel, match=r"x\.safetensors: format 'safetensors' writes a folder: name it x, or .*timm"
  ):
    vit_jax.save_model(tmp_path / "x.safetensors", model, params)
  assert os.listdir(tmp_path) == ["m"]


def test_an_interrupted_export_leaves_the_old_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  model, path = MODELS["vits"], tmp_path / "m"
  vit_jax.save_model(path, model, random_params(model, 0))

  def full_disk(*_: object) -> None:
    raise OSError("No space left on device")

  monkeypatch.setattr(hub.saving, "write_sharded", full_disk)
  with pytest.raises(OSError, match="No space"):
    vit_jax.save_model(path, model, random_params(model, 1))
  assert_same(vit_jax.load_model(path)[1], without_unused(model, random_params(model, 0)))
  assert os.listdir(tmp_path) == ["m"]


def test_wrong_requests_are_refused(tmp_path: pathlib.Path):
  model = MODELS["vits"]
  with pytest.raises(hub.UnknownModel, match="no format 'onnx'; there are safetensors, pth, timm, orbax"):
    vit_jax.save_model(tmp_path / "m", model, {}, format="onnx")
  with pytest.raises(hub.UnknownModel, match="mean and std belong together"):
    vit_jax.save_model(tmp_path / "m", model, {}, mean=(0.5,) * 3)
  with pytest.raises(hub.UnknownModel, match=r"is no model: expected a run's workdir .* a \.pth file"):
    vit_jax.load_model(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')
  write_safetensors(tmp_path / SINGLE, {"x": np.zeros(1)})
  with pytest.raises(WeightsError, match=r"config\.json: model_type 'bert' is not known"):
    vit_jax.load_model(tmp_path)


def test_a_training_export_of_the_reference_opens(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  model = MODELS["vits"]
  params = random_params(model)
  flat = weights.to_state_dict(params, model)
  named = {f"backbone.{name}": value for name, value in flat.items()} | {
    "dino_head.mlp.0.bias": np.zeros(3, np.float32)
  }
  write_pth(tmp_path / "teacher.pth", named)
  with caplog.at_level(logging.INFO):
    loaded, again = vit_jax.load_model(tmp_path / "teacher.pth", norm_eps=1e-6)
  assert_same(again, params)
  assert loaded.norm_eps == 1e-6
  assert "not loaded: dino_head" in caplog.text
  assert "inferred VisionTransformer(patch_size=8, width=32, depth=2, num_heads=2, mlp='gelu'" in caplog.text
  assert "assumed: rope.normalize='separate'" in caplog.text  # not norm_eps, which was given


def test_sharded_and_bare_safetensors_open(tmp_path: pathlib.Path):
  model = MODELS["vits"]
  params = without_unused(model, random_params(model))
  vit_jax.save_model(tmp_path, model, params)
  tensors = read_safetensors(tmp_path)
  (tmp_path / SINGLE).unlink()
  shards = {"a.safetensors": dict(list(tensors.items())[:7]), "b.safetensors": dict(list(tensors.items())[7:])}
  for name, part in shards.items():
    write_safetensors(tmp_path / name, part)
  index = {"weight_map": {tensor: shard for shard, part in shards.items() for tensor in part}}
  (tmp_path / INDEX).write_text(json.dumps(index))
  assert_same(vit_jax.load_model(tmp_path)[1], params)
  bare = tmp_path / "bare" / "reference_names.safetensors"
  bare.parent.mkdir()
  write_safetensors(bare, weights.to_state_dict(params, model))
  assert_same(vit_jax.load_model(bare)[1], params)


def test_no_registers_are_an_empty_tensor_of_hugging_face(tmp_path: pathlib.Path):
  """As transformers saves its default DINOv3ViTConfig; older exports of ours lack the tensor."""
  model = MODELS["no_registers"]
  params = without_unused(model, random_params(model))
  vit_jax.save_model(tmp_path, model, params)
  tensors = read_safetensors(tmp_path)
  empty = tensors.pop("embeddings.register_tokens")
  assert empty.shape == (1, 0, 32)
  for there in ({}, {"embeddings.register_tokens": empty}, {"embeddings.register_tokens": empty.astype(np.float16)}):
    write_safetensors(tmp_path / SINGLE, tensors | there)
    loaded, again = vit_jax.load_model(tmp_path)
    assert_same(again, params)
    assert loaded.apply({"params": again}, images()).registers.shape == (2, 0, 32)
  write_safetensors(tmp_path / SINGLE, tensors | {"embeddings.register_tokens": np.zeros((1, 2, 32), np.float32)})
  with pytest.raises(WeightsError, match=r"register_tokens is \(1, 2, 32\), expected \(1, 0, 32\)"):
    vit_jax.load_model(tmp_path)


def test_damaged_safetensors_are_named(tmp_path: pathlib.Path):
  model = MODELS["vits"]
  vit_jax.save_model(tmp_path / "m", model, random_params(model))
  os.truncate(tmp_path / "m" / SINGLE, 1000)
  with pytest.raises(WeightsError, match=r"model\.safetensors is not a readable safetensors file"):
    vit_jax.load_model(tmp_path / "m")


def test_non_contiguous_arrays_are_written_right(tmp_path: pathlib.Path):
  array = np.arange(6.0).reshape(2, 3).T
  write_safetensors(tmp_path / "x.safetensors", {"a": array})
  np.testing.assert_array_equal(read_safetensors(tmp_path / "x.safetensors")["a"], array)


def test_the_teacher_of_a_run_opens_from_workdir_and_step(tmp_path: pathlib.Path):
  c = config.default()
  with c.unlocked():
    c.model.update(patch_size=8, width=32, depth=2, num_heads=2, mlp_hidden=64, num_registers=1)
  model = methods.backbone(c)
  states = {
    step: {"teacher": {"backbone": random_params(model, step), "dino_head": {}}, "student": jnp.zeros(3)}
    for step in (2, 4)
  }
  with Checkpoints(tmp_path) as saved:
    for step, state in states.items():
      saved.save(step, state, {}, config.to_dict(c), {})
  for path, step in ((tmp_path, 4), (tmp_path / "checkpoints" / "2", 2)):
    loaded, params = vit_jax.load_model(path)
    assert loaded == model
    assert_same(params, states[step]["teacher"]["backbone"])
  assert vit_jax.load_model(tmp_path, remat="blocks")[0].remat == "blocks"
  (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
  with pytest.raises(NotSaved, match="no saved step"):
    vit_jax.load_model(tmp_path / "empty")


PUBLISHED = [
  *(f"dinov3_{size}" for size in ("vits16", "vits16plus", "vitb16", "vitl16", "vitl16_sat", "vitl16plus")),
  *("dinov3_vith16plus", "dinov3_vit7b16"),
  *(f"dinov3_convnext_{size}" for size in ("tiny", "small", "base", "large")),
  *(f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")),
  *("vit_ti16", "vit_b16", "vit_l16", "vit_h14", "deit_ti16_distilled", "deit_b16_distilled"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_gives_the_same_features_at_full_width(tmp_path: pathlib.Path, name: str):
  """At the published width and one block (per stage): what depends on sizes is head widths, grids and hidden widths."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  short = {"depths": (1, 1, 1, 1)} if "convnext" in name else {"depth": 1, "norm_eps": 1e-5}
  model = vit_jax.create_model(name, **short)
  if "dinov2" in name:  # Hugging Face resizes positions in another way than the repository
    model = model.clone(position_table=dataclasses.replace(model.position_table, offset=0.0))
  batch = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
  rng = np.random.default_rng(0)

  def moved(path: tuple, x: jax.Array) -> jax.Array:
    """Away from initial values of no influence: biases of 0, norms of 1, layer scales near 0."""
    start = 0.5 if "gamma" in str(path[-1]) else x
    return start + jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype) if x.size < 1e6 else x

  params = jax.tree_util.tree_map_with_path(moved, jax.jit(model.init)(jax.random.key(0), batch)["params"])
  vit_jax.save_model(tmp_path / "m", model, params)
  theirs = transformers.AutoModel.from_pretrained(tmp_path / "m").eval()
  with torch.no_grad():
    tokens = theirs(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
  features = jax.jit(with_both_tokens(model).apply)({"params": params}, batch)
  ours = np.concatenate([features.cls[:, None], features.registers, features.patches], axis=1)
  assert np.abs(ours - tokens).max() < 1e-4


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_transformers_gives_the_same_features(tmp_path: pathlib.Path, name: str):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = (MODELS | OTHERS)[name]
  params = random_params(model)
  vit_jax.save_model(tmp_path / "m", model, params, image_size=32)
  theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True)
  pooler = {"pooler.dense.weight", "pooler.dense.bias"}  # of a ViT; no part of the features
  assert set(report["missing_keys"]) <= pooler and not report["unexpected_keys"] and not report["mismatched_keys"]
  with torch.no_grad():
    batch = np.concatenate([images()] * 2, axis=1)  # 64 x 24 pixels, or 64 x 48: not the grid of the position tables
    batch = np.concatenate([batch] * 2, axis=2) if isinstance(model, ConvNeXt) else batch
    extra = {"interpolate_pos_encoding": True} if name in ("vit", "deit") else {}
    tokens = theirs.eval()(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()), **extra).last_hidden_state.numpy()
  features = with_both_tokens(model).apply({"params": params}, batch)
  ours = np.concatenate([features.cls[:, None], features.registers, features.patches], axis=1)
  assert np.abs(ours - tokens).max() < 1e-4
  theirs.save_pretrained(tmp_path / "again")
  loaded, again = vit_jax.load_model(tmp_path / "again")
  assert_same(again, without_unused(model, params))


def test_the_two_classifiers_of_a_distilled_deit_are_averaged(tmp_path: pathlib.Path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config = transformers.DeiTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=24, patch_size=8,
    num_labels=5, layer_norm_eps=1e-6,
  )  # fmt: skip
  theirs = transformers.DeiTForImageClassificationWithTeacher(config).eval()
  for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, 0.1, 0.3)
  theirs.save_pretrained(tmp_path)
  model, params = vit_jax.load_model(tmp_path)
  assert model.pool == "distilled"
  batch = images()[:, :24]
  with torch.no_grad():
    expected = theirs(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())).logits.numpy()
  heads = read_safetensors(tmp_path)
  both = model.clone(pool="cls").apply({"params": params}, batch)
  scores = [
    token @ heads[f"{name}_classifier.weight"].T + heads[f"{name}_classifier.bias"]
    for name, token in (("cls", both.cls), ("distillation", both.registers[:, 0]))
  ]
  np.testing.assert_allclose(np.mean(scores, axis=0), expected, atol=1e-4)
  features = model.apply({"params": params}, batch)
  np.testing.assert_allclose(features.cls, (both.cls + both.registers[:, 0]) / 2, atol=1e-6)


GREY = VisionTransformer(**(SMALL | {"in_channels": 1}), mask_k_bias=True, rope=Rope(rescale=2.0))
EXPORTS = {"safetensors": "m", "pth": "m.pth", "timm": "m.safetensors", "orbax": "m"}


@pytest.mark.parametrize("format", EXPORTS)
def test_channels_and_their_mean_and_std_go_with_the_weights(tmp_path: pathlib.Path, format: str):
  model = GREY.clone(masking=False) if format == "timm" else GREY
  params, path = random_params(model), tmp_path / EXPORTS[format]
  vit_jax.save_model(path, model, params, format, mean=(0.4,), std=(0.2,), image_size=48)
  loaded, again = vit_jax.load_model(path)
  assert loaded.in_channels == 1 and again["patch_embed"]["kernel"].shape == (8, 8, 1, 32)
  assert hub.load_preprocessing(path, channels=1) == hub.Preprocessing((0.4,), (0.2,), 48, None, standard(48))
  with pytest.raises(hub.UnknownModel, match=r"says mean=\(0\.4,\) and std=\(0\.2,\), .* the 3 channels"):
    hub.load_preprocessing(path)
  vit_jax.save_model(path, model, params, format)
  with pytest.raises(hub.UnknownModel, match="does not say with which mean and std, .* the 1 channels .* image_mean"):
    hub.load_preprocessing(path, channels=1)
  with pytest.raises(hub.UnknownModel, match=r"must have an entry for each of 1 channels"):
    vit_jax.save_model(path, model, params, format, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_published_satellite_files_are_known_by_their_names(tmp_path: pathlib.Path):
  for name, mean in (("vitl16_pretrain_sat493m-eadcf0ff.pth", 0.43), ("vitl16_pretrain_lvd1689m-8aa4cbdd.pth", 0.485)):
    vit_jax.save_model(tmp_path / name, MODELS["vits"], random_params(MODELS["vits"]), format="pth")
    assert hub.load_preprocessing(tmp_path / name).mean[0] == mean


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_keep_their_channels(tmp_path: pathlib.Path, name: str):
  model = OTHERS[name].clone(in_channels=5)
  params = random_params(model)
  for format in FORMATS[name]:
    path = tmp_path / EXPORTS[format]
    vit_jax.save_model(path, model, params, format)
    loaded, again = vit_jax.load_model(path, **({} if isinstance(model, ConvNeXt) else {"num_heads": 2}))
    assert loaded.in_channels == 5
    moved = {"cls_token", "positions"} if (name, format) == ("dinov2_reg", "timm") else set()
    assert_same(*({k: v for k, v in tree.items() if k in again and k not in moved} for tree in (again, params)))


def test_importing_vit_jax_is_light():
  code = "import sys, vit_jax; print([m for m in ('jax', 'flax', 'orbax', 'numpy') if m in sys.modules])"
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
  assert set(vit_jax.__all__) <= set(dir(vit_jax))
  for name in vit_jax.__all__:
    assert getattr(vit_jax, name) is not None
  with pytest.raises(AttributeError, match="no attribute 'load'; it has .*load_model"):
    vit_jax.load  # noqa: B018


@pytest.mark.parametrize("format", ["pth", "timm", "safetensors", "orbax"])
def test_pipes_and_devices_are_never_replaced(format, tmp_path: pathlib.Path):
  pipe, link = tmp_path / "pipe.safetensors", tmp_path / "link.safetensors"
  os.mkfifo(pipe)
  link.symlink_to(pipe)
  for place in (pipe, link):
    with pytest.raises(hub.UnknownModel):
      hub.check_place(place, format, overwrite=True)
  assert pipe.is_fifo() and link.is_symlink()
