"""Learned positions: of which grid they are is read, given, or asked for, and never guessed between two readings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import pathlib

import numpy as np
import pytest

import vit_jax
from tests.test_hub import random_params
from vit_jax import cli, weights
from vit_jax.commands import flags
from vit_jax.methods import init_from
from vit_jax.models import PositionTable, VisionTransformer
from vit_jax.weights import WeightsError, timm_config
from vit_jax.weights.files import write_safetensors
from vit_jax.weights.grids import ImageSize, find_table, grids
from vit_jax.weights.pth import write_pth

SMALL = dict(patch_size=8, width=48, depth=1, num_heads=4, mlp_hidden=96, rope=None)
NOT_SQUARE = PositionTable((14, 16), antialias=True)  # 224 patches and a class token: 15 * 15 rows
WITH_CLASS, WITHOUT = {"cls": 1, "none": 0}, {"none": 0}


@pytest.mark.parametrize(
  ("rows", "readings", "table"),
  [
    (197, WITH_CLASS, PositionTable((14, 14))),
    (196, WITHOUT, PositionTable((14, 14), prefix="none")),
    (21, {"all": 5, "none": 0}, PositionTable((4, 4), prefix="all")),
    (256, {"all": 5, "none": 0}, PositionTable((16, 16), prefix="none")),  # 251 is prime
  ],
)
def test_a_square_grid_that_is_the_one_possible_is_found(rows, readings, table):
  assert find_table(rows, readings, 16, given=None, said=None) == table


@pytest.mark.parametrize(
  ("rows", "readings", "listed"),
  [
    (225, WITH_CLASS, "224 patches with one of the class token (14 x 16, 16 x 14, 8 x 28"),
    (225, WITH_CLASS, "or 225 patches without positions of other tokens (15 x 15"),
    (196, WITH_CLASS, "(13 x 15, 15 x 13, 5 x 39"),  # no_embed_class leaves no trace
    (161, {"cls": 1}, "160 patches with one of the class token (10 x 16, 16 x 10, 8 x 20, 20 x 8"),
    (224, WITHOUT, "224 patches without positions of other tokens (14 x 16"),
    (1369, {"all": 5, "none": 0}, "1364 patches with 5 of the tokens before the patches (31 x 44"),
    (9, {"all": 5, "none": 0}, "4 patches with 5 of the tokens before the patches (2 x 2)"),
    (3, {"cls": 1}, "2 patches with one of the class token (one row or column)"),
  ],
)
def test_several_readings_are_an_error_that_lists_them_and_says_what_to_give(rows, readings, listed):
  with pytest.raises(WeightsError) as caught:
    find_table(rows, readings, 16, given=None, said=None)
  assert listed in str(caught.value) and "\n" not in str(caught.value)
  assert "image_size=(H, W)" in str(caught.value) and "--image_size=HxW" in str(caught.value)


def test_what_is_given_decides_and_must_fit():
  find = lambda rows, **kinds: find_table(rows, WITH_CLASS, 16, **{"given": None, "said": None} | kinds)  # noqa: E731
  assert find(225, given=ImageSize(224, 256)) == PositionTable((14, 16))
  assert find(225, given=ImageSize(240, 240)) == PositionTable((15, 15), prefix="none")
  assert find(225, given=(16, 14)) == PositionTable((16, 14))
  whole = PositionTable((16, 14), offset=0.1)
  assert find(225, given=whole) == whole
  assert find(225, given=PositionTable((15, 15))) == PositionTable((15, 15), prefix="none")  # which the rows decide
  assert find(225, said=ImageSize(240, 240)) == PositionTable((15, 15), prefix="none")
  assert find(225, given=(14, 16), said=ImageSize(240, 240)) == PositionTable((14, 16))
  for given in (ImageSize(224, 224), (14, 14), PositionTable((14, 14))):
    with pytest.raises(WeightsError, match=r"14.* does not fit 225 positions: 224 patches with one of the class token"):
      find(225, given=given)
  with pytest.raises(WeightsError, match="do not say of which grid"):  # a configuration that was not kept up to date
    find(225, said=ImageSize(224, 224))


def test_grids_are_listed_from_the_squarest():
  assert grids(12) == [(3, 4), (4, 3), (2, 6), (6, 2)] and grids(16)[0] == (4, 4) and grids(7) == []


def timm_file(folder: pathlib.Path, model: VisionTransformer, **beside: dict) -> tuple[pathlib.Path, dict]:
  params, path = random_params(model), folder / "model.safetensors"
  write_safetensors(path, weights.to_state_dict(params, model, "timm"))
  for name, content in beside.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return path, params


def test_a_file_of_timm_is_opened_when_the_grid_is_given_or_in_its_configuration(tmp_path: pathlib.Path, caplog):
  model = VisionTransformer(**SMALL, masking=False, position_table=NOT_SQUARE)
  path, params = timm_file(tmp_path, model)
  with pytest.raises(WeightsError, match=r"model\.safetensors: the 225 learned positions do not say"):
    vit_jax.load_model(path, num_heads=4)
  batch = np.random.default_rng(0).normal(size=(1, 112, 128, 3)).astype(np.float32)
  expected = model.apply({"params": params}, batch).cls
  for given in ({"image_size": (112, 128)}, {"position_table": (14, 16)}, {"position_table": NOT_SQUARE}):
    loaded, again = vit_jax.load_model(path, num_heads=4, **given)
    assert loaded.position_table == NOT_SQUARE
    np.testing.assert_array_equal(loaded.apply({"params": again}, batch).cls, expected)
  configuration = {"architecture": "vit_small_patch16_224", "pretrained_cfg": {"input_size": [3, 112, 128]}}
  made_so = {"model_args": {"img_size": [112, 128]}, "pretrained_cfg": {"input_size": [3, 120, 120]}}
  for said in (configuration, made_so):
    timm_file(tmp_path, model, config=said)
    assert vit_jax.load_model(tmp_path, num_heads=4)[0].position_table == NOT_SQUARE
  with pytest.raises(vit_jax.hub.UnknownModel, match="both say the grid"):
    vit_jax.load_model(path, image_size=112, position_table=(14, 16))
  for wrong in ({"image_size": (1, 2, 3)}, {"image_size": 0}, {"position_table": (14,)}):
    with pytest.raises(vit_jax.hub.UnknownModel, match="must be"):
      vit_jax.load_model(path, **wrong)


@pytest.mark.parametrize(
  ("architecture", "dropped", "added", "message"),
  [
    ("vit_small_patch16_rope_224", "pos_embed", None, "blocks have attn.qkv.bias, but no pos_embed"),
    ("eva02_tiny_patch14_224", None, "attn.q_bias", "blocks have attn.q_bias, but a pos_embed"),
    ("vit_base_patch16_clip_quickgelu_224", None, None, "which has a QuickGELU: it is not read"),
  ],
)
def test_models_of_timm_that_are_others_are_refused_in_words(tmp_path, architecture, dropped, added, message):
  model = VisionTransformer(**SMALL, masking=False, num_registers=0, layer_scale=None, mask_k_bias=False,
                            position_table=PositionTable((4, 4)))  # fmt: skip
  state = weights.to_state_dict(random_params(model), model, "timm")
  tensors = {name: np.asarray(tensor) for name, tensor in state.items()}
  tensors |= {f"blocks.0.{added}": np.zeros(48, np.float32)} if added else {}
  write_safetensors(tmp_path / "model.safetensors", {name: t for name, t in tensors.items() if name != dropped})
  (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": {}}))
  with pytest.raises(WeightsError, match=message):
    vit_jax.load_model(tmp_path, num_heads=4)


def test_rotary_positions_of_other_models_than_dinov3_are_not_taken_for_its_own():
  config = {"architecture": "vit_base_patch16_rope_reg1_gap_256"}
  with pytest.raises(WeightsError, match="has rotary positions of its own"):
    timm_config.check_architecture(config, rotary=True)
  timm_config.check_architecture({"architecture": "vit_small_patch16_dinov3"}, rotary=True)
  timm_config.check_architecture(config, rotary=False)


def test_all_that_was_inferred_is_listed(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  path, _ = timm_file(tmp_path, VisionTransformer(**SMALL, masking=False, position_table=PositionTable((4, 4))))
  with caplog.at_level(logging.INFO):
    vit_jax.load_model(path, num_heads=4)
  inferred = next(message for message in caplog.messages if "inferred VisionTransformer(" in message)
  for name in ("patch_size=8", "class_token=True", "num_registers=0", "pool='cls'", "position_table=PositionTable("):
    assert name in inferred
  assert "assumed: norm_eps=1e-06, mlp='gelu', pool='cls', position_table=PositionTable(grid=(4, 4)" in caplog.text


def test_dinov2_files_and_the_command_line_take_it_too(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
  model = VisionTransformer(**SMALL, layer_scale=1.0, position_table=PositionTable((8, 20), offset=0.1))
  params = random_params(model)
  write_pth(tmp_path / "m.pth", weights.to_state_dict(params, model, "dinov2"))
  convert = ["convert", f"--from={tmp_path / 'm.pth'}", f"--to={tmp_path / 'm'}", "--format=orbax"]
  assert cli.main(convert) != 0
  assert "160 patches with one of the class token (10 x 16" in capsys.readouterr().err
  assert not cli.main([*convert, "--image_size=64x160"])
  loaded, _ = vit_jax.load_model(tmp_path / "m")
  assert loaded.position_table == model.position_table
  with pytest.raises(vit_jax.hub.UnknownModel, match=r"grid of \(8, 20\), not \(20, 8\)"):
    vit_jax.load_model(tmp_path / "m", image_size=(160, 64))
  with pytest.raises(WeightsError, match=r"position_table\.grid=\(8, 20\) \(only squares\)"):
    vit_jax.save_model(tmp_path / "hf", loaded.clone(position_table=PositionTable((8, 20))), params)


def test_rotary_models_have_no_table_to_give_a_grid_for(tmp_path: pathlib.Path):
  model = VisionTransformer(patch_size=8, width=32, depth=1, num_heads=2, layer_scale=1.0)
  params = random_params(model)
  write_pth(tmp_path / "bare.pth", weights.to_state_dict(params, model))
  for format, path in (("safetensors", "a"), ("pth", "b.pth"), ("orbax", "c"), (None, "bare.pth")):
    if format:
      vit_jax.save_model(tmp_path / path, model, params, format)
    for given in ({"image_size": 32}, {"position_table": (4, 4)}, {"position_table": PositionTable((4, 4))}):
      with pytest.raises(ValueError, match="a grid of 4 x 4 patches.* which this model lacks"):
        vit_jax.load_model(tmp_path / path, **given)


KINDS = {
  "class": {},
  "class, no_embed_class": {"no_embed_class": True},
  "registers": {"reg_tokens": 4},
  "registers, no_embed_class": {"reg_tokens": 4, "no_embed_class": True},
  "no class": {"class_token": False, "global_pool": "avg"},
  "no class, registers": {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(48, 80), (112, 128)])
def test_timms_features_of_images_that_are_not_square(tmp_path: pathlib.Path, kind: str, size: tuple[int, int]):
  torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
  torch.manual_seed(0)
  sizes = dict(img_size=size, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0)
  theirs = timm.models.VisionTransformer(**sizes, **KINDS[kind]).eval()
  for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, 0.1, 0.3)
  write_safetensors(tmp_path / "m.safetensors", {k: v.numpy() for k, v in theirs.state_dict().items()})
  batch = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs.forward_features(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())).numpy()
  model, params = vit_jax.load_model(tmp_path / "m.safetensors", num_heads=4, image_size=size)
  features = model.apply({"params": params}, batch)
  front = [features.cls[:, None]] if model.class_token else []
  tokens = features.prenorm if model.pool_norm else np.concatenate([*front, features.registers, features.patches], 1)
  np.testing.assert_allclose(tokens, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
  table = PositionTable(model.position_table.grid)
  whole, _ = vit_jax.load_model(tmp_path / "m.safetensors", num_heads=4, position_table=table)
  assert whole.position_table == dataclasses.replace(model.position_table, antialias=False)
  again = tmp_path / "again.safetensors"
  vit_jax.save_model(again, model, params, "timm")
  assert vit_jax.load_model(again)[0].position_table == model.position_table  # ours say the grid themselves


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_hugging_faces_features_of_images_that_are_not_square(tmp_path: pathlib.Path, kind: str):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  config = getattr(transformers, f"{kind}Config")(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8, image_size=(56, 64)
  )
  theirs = getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False).eval()
  for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, 0.1, 0.3)
  theirs.save_pretrained(tmp_path / "theirs")
  batch = np.random.default_rng(0).normal(size=(2, 56, 64, 3)).astype(np.float32)
  images = torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())
  for given in ({}, {"image_size": (56, 64)}, {"position_table": (7, 8)}, {"position_table": PositionTable((7, 8))}):
    model, params = vit_jax.load_model(tmp_path / "theirs", **given)
    features = model.clone(pool="cls").apply({"params": params}, batch)
    tokens = np.concatenate([features.cls[:, None], features.registers, features.patches], axis=1)
    with torch.no_grad():
      expected = theirs(images).last_hidden_state.numpy()
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
  vit_jax.save_model(tmp_path / "ours", model, params)
  again = transformers.AutoModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False).eval()
  with torch.no_grad():
    np.testing.assert_array_equal(again(images).last_hidden_state.numpy(), expected)


def test_a_run_takes_the_grid_that_its_config_says(tmp_path: pathlib.Path):
  """Of weights to start from that do not say it, such as timm's without a position of the class token."""
  table = PositionTable((14, 14), prefix="none", antialias=True)
  model = VisionTransformer(**SMALL, masking=False, position_table=table)
  path, params = timm_file(tmp_path, model)
  with pytest.raises(WeightsError, match="the 196 learned positions do not say"):
    vit_jax.load_model(path, num_heads=4)
  source = init_from.open_file(path, {"backbone": model.clone(masking=True)})
  assert source.model == model.clone(position_table=table)
  assert source.parts["backbone"]["positions"] == (196, 48)
  other = model.clone(position_table=PositionTable((16, 16)))
  with pytest.raises(WeightsError, match=r"\(a grid of 16 x 16 patches\) does not fit 196 positions"):
    init_from.open_file(path, {"backbone": other})


def test_evaluations_take_a_side_or_what_positions_are_for():
  parser = argparse.ArgumentParser()
  flags.with_sizes(parser)
  assert flags.sizes(parser.parse_args(["--image_size=96"])) == (96, None)
  assert flags.sizes(parser.parse_args(["--image_size=224x256"])) == (None, (224, 256))
  assert flags.sizes(parser.parse_args([])) == (None, None)
  for wrong in ("0", "0x5", "5x0", "axb", "224x", "1x2x3", "-3"):
    with pytest.raises(SystemExit):
      parser.parse_args([f"--image_size={wrong}"])


def test_evaluate_opens_a_file_whose_grid_is_given(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
  model = VisionTransformer(**SMALL, layer_scale=1.0, position_table=PositionTable((2, 5), offset=0.1))
  write_pth(tmp_path / "m.pth", weights.to_state_dict(random_params(model), model, "dinov2"))
  data = ["--data=embedded:textures?size=16&count=40", "--max_examples=40", f"--json={tmp_path / 'scores.json'}"]
  assert cli.main(["evaluate", f"--model={tmp_path / 'm.pth'}", *data]) != 0
  assert "10 patches with one of the class token (2 x 5, 5 x 2)" in capsys.readouterr().err
  assert not cli.main(["evaluate", f"--model={tmp_path / 'm.pth'}", "--image_size=16x40", *data])
  assert "knn" in (tmp_path / "scores.json").read_text()
