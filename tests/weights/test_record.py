"""What no tensor tells of a model goes with its export, in every format, and is checked against the tensors."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax import hub, weights
from vit_jax.models import ConvNeXt, PositionTable, Rope, VisionTransformer, create_model
from vit_jax.weights import WeightMismatch, WeightsError
from vit_jax.weights.files import SINGLE, read_metadata, read_safetensors, write_safetensors
from vit_jax.weights.pth import read_extra, read_pth, write_pth
from vit_jax.weights.record import MODEL

PLACES = {"safetensors": "m", "pth": "m.pth", "timm": "m.safetensors", "orbax": "m"}
SMALL = dict(patch_size=8, width=32, depth=1, num_heads=4, num_registers=2)
DINOV3 = VisionTransformer(**SMALL, layer_scale=1.0, mask_k_bias=True, norm_eps=1e-4, rope=Rope(rescale=1.5))
DINOV2 = VisionTransformer(**SMALL, layer_scale=0.5, norm_eps=1e-4, rope=None, position_table=PositionTable((2, 3)))
VIT = VisionTransformer(
  **(SMALL | {"num_registers": 0}), norm_eps=1e-4, rope=None, masking=False, position_table=PositionTable((3, 3))
)
MODELS = {  # by name: a model, and the formats besides orbax that can express it
  "quickstart": (
    create_model("dinov3_vits16", width=128, num_heads=4, layer_scale=1, patch_size=8, depth=1, mlp_hidden=64),
    ("safetensors", "pth", "timm"),
  ),
  "vit_s16": (create_model("vit_s16", width=128, num_heads=4, depth=1), ("safetensors", "pth", "timm")),
  "dinov3": (DINOV3, ("safetensors", "pth", "timm")),
  "rope": (
    DINOV3.clone(rope=Rope(base=None, min_period=0.5, max_period=30.0, normalize="max", dtype="bfloat16")),
    ("pth", "timm"),
  ),
  "no_positions": (DINOV3.clone(rope=None, mask_k_bias=False), ("pth", "timm")),
  "rmsnorm": (DINOV3.clone(norm="rmsnorm", separate_cls_norm=True), ("pth",)),
  "oblong_table": (DINOV2, ("pth", "timm")),
  "sincos": (VIT.clone(position_table=PositionTable((3, 3), kind="sincos"), pool="avg"), ("timm",)),
  "gelu_tanh": (VIT.clone(mlp="gelu_tanh", pool="avg"), ("timm",)),
  "convnext": (ConvNeXt(depths=(1, 1, 1, 1), widths=(8, 8, 16, 16), norm_eps=1e-3), ("pth",)),
}


def random_params(model: VisionTransformer | ConvNeXt) -> dict[str, Any]:
  size = 2 * model.stride
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, model.in_channels)))["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.2, 0.3, leaf.shape), leaf.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def features(model: VisionTransformer | ConvNeXt, params: dict[str, Any]) -> Any:
  """Compiled once for all models that are equal."""
  return model.apply({"params": params}, jnp.sin(jnp.arange(48 * 32 * 3.0)).reshape(1, 48, 32, 3))


def rewritten(path: pathlib.Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
  """Changes the record in a file, or takes it out."""
  is_pth = path.suffix == ".pth"
  record = change(json.loads(read_extra(path, MODEL) if is_pth else read_metadata(path)[MODEL]))
  texts = {} if record is None else {MODEL: json.dumps(record)}
  if is_pth:
    write_pth(path, read_pth(path), texts)
  else:
    write_safetensors(path, read_safetensors(path), texts)


def saying(**attributes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
  return lambda record: record | {"attributes": record["attributes"] | attributes}


@pytest.mark.parametrize("name", MODELS)
def test_an_export_reloads_as_the_same_model(tmp_path: pathlib.Path, name: str, caplog: pytest.LogCaptureFixture):
  model, formats = MODELS[name]
  params = random_params(model)
  expected = features(model, params)
  for format in (*formats, "orbax"):
    path = tmp_path / format / PLACES[format]
    vit_jax.save_model(path, model, params, format)
    loaded, again = vit_jax.load_model(path)
    chex.assert_trees_all_equal(features(loaded, again), expected)
    if format in ("pth", "timm"):
      kept = model.clone(masking=loaded.masking) if hasattr(model, "masking") else model
      if (name, format) == ("oblong_table", "timm"):  # whose registers have no position, so that no token before has
        kept = kept.clone(position_table=PositionTable((2, 3), prefix="none"))
      assert loaded == kept
  assert "assumed" not in caplog.text


@pytest.mark.parametrize("format", ["pth", "timm"])
def test_a_file_without_the_record_is_opened_as_before_and_says_what_was_assumed(
  tmp_path: pathlib.Path, format: str, caplog: pytest.LogCaptureFixture
):
  path = tmp_path / PLACES[format]
  vit_jax.save_model(path, MODELS["vit_s16"][0], random_params(MODELS["vit_s16"][0]), format)
  rewritten(path, lambda record: None)
  loaded, _ = vit_jax.load_model(path)
  assert loaded.num_heads == 2 and loaded.norm_eps == 1e-6
  (said,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
  assert said.startswith(f"{path}: not in the file, assumed: num_heads=2, norm_eps=1e-06, ")
  assert "load_model(path, num_heads=…, norm_eps=…, " in said
  assert vit_jax.load_model(path, num_heads=4)[0].num_heads == 4


def test_a_timm_file_has_its_record_under_the_name_of_a_folder_too(tmp_path: pathlib.Path):
  vit_jax.save_model(tmp_path / SINGLE, VIT, random_params(VIT), "timm", mean=(0.4,) * 3, std=(0.2,) * 3)
  assert vit_jax.load_model(tmp_path)[0] == vit_jax.load_model(tmp_path / SINGLE)[0] == VIT
  assert hub.load_preprocessing(tmp_path).mean == (0.4,) * 3


def test_a_timm_file_beside_the_configuration_of_another_model_is_itself(tmp_path: pathlib.Path):
  vit_jax.save_model(tmp_path, DINOV3, random_params(DINOV3))
  vit_jax.save_model(tmp_path / "x.safetensors", VIT, random_params(VIT), "timm")
  assert vit_jax.load_model(tmp_path / "x.safetensors")[0] == VIT


@pytest.mark.parametrize(
  ("model", "format", "wrong", "named"),
  [
    (DINOV3, "pth", {"num_heads": 2}, "says num_heads=2, but its tensors are those of num_heads=4"),
    (DINOV3, "pth", {"num_heads": 3}, "says num_heads=3: must divide width=32"),
    (DINOV3, "pth", {"rope": {"base": 50.0}}, r"says rope=Rope\(base=50\.0, .* those of rope=Rope\(base=100\.0"),
    (VIT, "timm", {"width": 64}, "says width=64, mlp_hidden=None, but .* those of width=32, mlp_hidden=128"),
    (DINOV2, "pth", {"layer_scale": None}, r"says layer_scale=None, but .* those of layer_scale=1e-05"),
    (VIT, "timm", {"qk_norm": True}, "says qk_norm=True, but .* those of qk_norm=False"),
    (
      VIT,
      "timm",
      {"position_table": {"grid": [2, 2]}},
      r"says position_table=PositionTable\(grid=\(2, 2\), .*\(3, 3\)",
    ),
    (MODELS["convnext"][0], "pth", {"depths": [1, 1, 2, 1]}, r"says depths=\(1, 1, 2, 1\), but .*\(1, 1, 1, 1\)"),
    (VIT, "timm", {"heads": 2}, "describes no model that this version of vit_jax knows: .*'heads'"),
  ],
)
def test_a_record_that_the_tensors_refute_is_an_error(
  tmp_path: pathlib.Path, model: VisionTransformer, format: str, wrong: dict[str, Any], named: str
):
  if model is DINOV2:  # whose table is recognised where it is square
    model = model.clone(position_table=PositionTable((3, 3)))
  path = tmp_path / PLACES[format]
  vit_jax.save_model(path, model, random_params(model), format)
  rewritten(path, saying(**wrong))
  with pytest.raises(WeightsError, match=rf"{path.name}: its model\.json {named}"):
    vit_jax.load_model(path)


def test_broken_tensors_are_not_laid_to_the_record(tmp_path: pathlib.Path):
  path = tmp_path / "m.safetensors"
  vit_jax.save_model(path, VIT, random_params(VIT), "timm")
  text, tensors = read_metadata(path)[MODEL], read_safetensors(path)
  del tensors["blocks.0.attn.proj.weight"]
  write_safetensors(path, tensors, {MODEL: text})
  with pytest.raises(WeightMismatch, match=r"m\.safetensors: 1 tensors .*\n *missing: blocks\.0\.attn\.proj\.weight"):
    vit_jax.load_model(path)


def test_a_damaged_record_is_named(tmp_path: pathlib.Path):
  write_pth(tmp_path / "m.pth", weights.to_state_dict(random_params(DINOV3), DINOV3), {MODEL: "{"})
  with pytest.raises(WeightsError, match=r"m\.pth: its model\.json cannot be read"):
    vit_jax.load_model(tmp_path / "m.pth")
