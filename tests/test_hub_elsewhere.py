"""What an export says of how it is loaded elsewhere is Python that does it, and gives the same features."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.test_hub import MODELS as DINOV3
from tests.test_hub import OTHERS, SMALL, random_params
from vit_jax import cli, hub, weights
from vit_jax.models import PositionTable, Rope, VisionTransformer
from vit_jax.weights import WeightsError
from vit_jax.weights.pth import write_pth

PLAIN = dict(patch_size=8, width=48, depth=2, num_heads=4, rope=None, masking=False)
TABLE = PositionTable((4, 4), antialias=True)
TIMM = {  # every kind that timm has a counterpart for
  "dinov3": DINOV3["vits"],
  "dinov3 plus": DINOV3["vits_plus"],
  "dinov3 7b": DINOV3["vit7b"],
  "dinov3, of other attributes": VisionTransformer(
    **(SMALL | {"num_registers": 0, "norm_eps": 1e-6, "in_channels": 1, "width": 48}),
    mask_k_bias=True, mlp_hidden=100, rope=Rope(base=50.0), class_token=False, pool="avg",
  ),
  "vit": OTHERS["vit"],
  "deit": OTHERS["deit"],
  "dinov2": OTHERS["dinov2"],
  "dinov2 giant": OTHERS["dinov2_swiglu"],
  "dinov2 registers": OTHERS["dinov2_reg"],
  "not square": VisionTransformer(**PLAIN, position_table=PositionTable((4, 6), antialias=True)),
  "mean": VisionTransformer(**PLAIN, position_table=TABLE, pool="avg"),
  "mean, then norm": VisionTransformer(**PLAIN, position_table=TABLE, pool="avg", pool_norm=True),
  "no class token": VisionTransformer(
    **PLAIN, position_table=PositionTable((4, 4), prefix="none", antialias=True), class_token=False, patch_bias=False,
    pre_norm=True, pool="avg", pool_norm=True,
  ),
  "registers with positions": VisionTransformer(
    **PLAIN, position_table=PositionTable((4, 4), prefix="all", antialias=True), num_registers=4, layer_scale=1e-5,
    qk_norm=True,
  ),
  "approximate gelu, no biases, five channels": VisionTransformer(
    **PLAIN, position_table=TABLE, mlp="gelu_tanh", qkv_bias=False, proj_bias=False, mlp_bias=False, in_channels=5,
    mlp_hidden=100, norm_eps=1e-5,
  ),
}  # fmt: skip


TOO_LARGE = ("convnext", "7b", "giant", "huge", "vitg14", "h14", "h16", "so400m", "vitl", "vit_l", "large")
SMALL_ENOUGH = [name for name in vit_jax.list_models() if not any(size in name for size in TOO_LARGE)]


def run(text: str) -> dict[str, Any]:
  found: dict[str, Any] = {}
  exec(text, found)
  return found


def part(text: str, library: str) -> str:
  """The lines for one library, of what `how_to_load` says."""
  _, *parts = re.split(r"(?m)^# (vit_jax|transformers|timm|PyTorch)$", text)
  return dict(zip(parts[::2], parts[1::2], strict=True))[library]


def tokens(model: VisionTransformer, params: dict, batch: np.ndarray) -> np.ndarray:
  if getattr(model, "class_token", False):
    model = model.clone(pool="cls")
  features = model.apply({"params": params}, batch)
  if getattr(model, "pool_norm", False):
    return np.asarray(features.prenorm)
  front = [features.cls[:, None]] if getattr(model, "class_token", True) else []
  return np.concatenate([*front, features.registers, features.patches], axis=1)


@pytest.mark.parametrize("kind", TIMM)
def test_the_lines_for_timm_load_the_export(tmp_path: pathlib.Path, kind: str):
  torch, _ = pytest.importorskip("torch"), pytest.importorskip("timm")
  model = TIMM[kind]
  params, path = random_params(model), tmp_path / "it's.safetensors"
  vit_jax.save_model(path, model, params, "timm")
  theirs = run(part(hub.how_to_load(path, model, "timm", images=False), "timm"))["model"].eval()
  side = (32, 32) if model.position_table is None else [8 * n for n in model.position_table.grid]
  batch = np.random.default_rng(1).normal(size=(2, *side, model.in_channels)).astype(np.float32)
  with torch.no_grad():
    expected = theirs.forward_features(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())).numpy()
    pooled = theirs(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())).numpy()
  if kind == "dinov3 7b":
    params = {name: value for name, value in params.items() if name != "local_cls_norm"}
    model = model.clone(separate_local_cls_norm=False)
  ours = tokens(model, params, batch)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-6 * np.abs(expected).max())
  if model.pool != "distilled":
    features = model.apply({"params": params}, batch)
    np.testing.assert_allclose(features.cls, pooled, rtol=0, atol=5e-6 * np.abs(pooled).max())


@pytest.mark.parametrize(
  ("name", "call"),
  [
    ("dinov3_vits16", 'create_model("vit_small_patch16_dinov3_qkvb", checkpoint_path="m", num_classes=0, '),
    ("dinov3_vits16plus", 'create_model("vit_small_plus_patch16_dinov3_qkvb", '),
    ("dinov3_vith16plus", 'create_model("vit_huge_plus_patch16_dinov3_qkvb", '),
    ("dinov3_vit7b16", 'create_model("vit_7b_patch16_dinov3", '),
    ("dinov2_vitg14_reg", 'create_model("vit_giant_patch14_reg4_dinov2", checkpoint_path="m", num_classes=0)'),
    ("dinov2_vits14", 'create_model("vit_small_patch14_dinov2", checkpoint_path="m", num_classes=0)'),
    ("vit_h14", 'create_model("vit_huge_patch14_224", checkpoint_path="m", num_classes=0)'),
    ("deit_s16_distilled", 'create_model("deit_small_distilled_patch16_224", checkpoint_path="m", num_classes=0)'),
  ],
)
def test_published_sizes_have_their_names_in_timm(name: str, call: str):
  text = hub.how_to_load("m", vit_jax.create_model(name), "timm")
  assert call in text
  if name.startswith("dinov3"):
    assert text.rstrip().endswith('num_classes=0, global_pool="token")')


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_ENOUGH)
def test_timm_names_make_the_published_models(name: str):
  timm = pytest.importorskip("timm")
  model = vit_jax.create_model(name)
  text = part(hub.how_to_load("m", model, "timm", images=False), "timm")
  if "no counterpart" in text:  # a key bias that has an effect beside rotary positions
    assert name.startswith("vit_") and model.rope is not None
    return
  made = run(text.replace('checkpoint_path="m", ', ""))["model"]
  shapes = {key: tuple(value.shape) for key, value in made.state_dict().items()}
  shapes |= {"pos_embed": shapes["pos_embed"]} if "pos_embed" in shapes else {}
  exported = hub.timm_models._as_exported(model.clone(masking=False, separate_local_cls_norm=False))
  params = jax.eval_shape(exported.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
  assert {name: tensor.shape for name, tensor in weights.lazy_state_dict(params, exported, "timm").items()} == shapes
  assert timm.__version__


@pytest.mark.parametrize("name", ["vits", "no_registers", "convnext", "dinov2", "dinov2_reg", "vit", "deit"])
def test_the_lines_for_transformers_load_the_export_and_its_images(tmp_path: pathlib.Path, name: str):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  pytest.importorskip("torchvision")
  model = (DINOV3 | OTHERS)[name]
  params, path = random_params(model), tmp_path / "m"
  side = 32 if isinstance(model, type(OTHERS["convnext"])) or model.position_table is None else 24
  vit_jax.save_model(path, model, params, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=side)
  found = run(part(hub.how_to_load(path, model, "safetensors"), "transformers"))
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
  inputs = found["processor"](image, return_tensors="pt")
  with torch.no_grad():
    expected = found["model"].eval()(**inputs).last_hidden_state.numpy()
  ours = tokens(model, params, vit_jax.load_images(image, like=path))
  assert np.abs(ours - expected).max() <= 0.1 * np.abs(expected).max()  # images agree to a level of 255
  same = tokens(model, params, inputs["pixel_values"].numpy().transpose(0, 2, 3, 1))
  np.testing.assert_allclose(same, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  _, report = transformers.AutoModel.from_pretrained(
    path, output_loading_info=True, **({"add_pooling_layer": False} if name in ("vit", "deit") else {})
  )
  assert not any(report.values())


def test_the_lines_for_vit_jax_load_every_format(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.chdir(tmp_path)
  model = DINOV3["vits"].clone(masking=False)
  params = random_params(model)
  Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("photo.jpg")
  for format, path in {"safetensors": "a", "pth": "b.pth", "timm": "c.safetensors", "orbax": "d"}.items():
    vit_jax.save_model(path, model, params, format, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=32)
    found = run(part(hub.how_to_load(path, model, format), "vit_jax"))
    assert found["model"].width == model.width and found["images"].shape == (1, 32, 32, 3)
    assert found["model"].apply({"params": found["params"]}, found["images"]).cls.shape == (1, 32)


@pytest.mark.parametrize(
  ("name", "lines"),
  [
    ("dinov3_vits16", ['torch.hub.load(REPO, "dinov3_vits16", source="local", weights="m.pth")']),
    ("dinov3_vit7b16", ['torch.hub.load(REPO, "dinov3_vit7b16", source="local", weights="m.pth")']),
    ("dinov3_vitl16", ['"dinov3_vitl16", source="local", pretrained=False)', 'torch.load("m.pth", map_location=']),
    ("dinov3_convnext_tiny", ['"dinov3_convnext_tiny", source="local", pretrained=False)']),
    ("dinov2_vits14", ['torch.hub.load("facebookresearch/dinov2", "dinov2_vits14", pretrained=False)']),
    ("dinov2_vitl14_reg", ['torch.hub.load("facebookresearch/dinov2", "dinov2_vitl14_reg", pretrained=False)']),
    ("dinov3_vitl16_sat", ["import DinoVisionTransformer", "untie_global_and_local_cls_norm=True"]),
  ],
)
def test_the_lines_for_the_repositories_name_the_published_sizes(name: str, lines: list[str]):
  """Run by nobody here: they need a clone of the repository."""
  text = part(hub.how_to_load("m.pth", vit_jax.create_model(name), "pth"), "PyTorch")
  compile(text, "m", "exec")
  assert all(line in text for line in lines)
  other = hub.how_to_load("m.pth", vit_jax.create_model("dinov3_vits16", depth=3, patch_size=8), "pth")
  assert 'DinoVisionTransformer(patch_size=8, in_chans=3, embed_dim=384, depth=3, num_heads=6, ffn_ratio=4.0' in other


def test_export_prints_them(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
  model = DINOV3["vits"]
  vit_jax.save_model(tmp_path / "m", model, random_params(model), "orbax")
  assert not cli.main(["convert", f"--from={tmp_path / 'm'}", f"--to={tmp_path / 'hf'}"])
  said = capsys.readouterr().out
  assert f"wrote {tmp_path / 'hf'} (safetensors)" in said
  assert f'AutoModel.from_pretrained("{tmp_path / "hf"}")' in said and f'load_model("{tmp_path / "hf"}")' in said


def dinov2_pth(folder: pathlib.Path, **attributes: Any) -> tuple[VisionTransformer, dict, pathlib.Path]:
  """As Meta publishes it: names of its repository, and nothing that says how positions are resized."""
  sizes = dict(patch_size=8, width=64, depth=2, num_heads=1, layer_scale=1.0, rope=None)
  model = VisionTransformer(**(sizes | {"position_table": PositionTable((6, 6), offset=0.1)} | attributes))
  params = random_params(model)
  write_pth(folder / "dinov2.pth", weights.to_state_dict(params, model, "dinov2"))
  return model, params, folder / "dinov2.pth"


def test_metas_dinov2_becomes_hugging_faces_and_the_difference_is_said(tmp_path: pathlib.Path, capsys, caplog):
  model, params, path = dinov2_pth(tmp_path)
  convert = ["convert", f"--from={path}", f"--to={tmp_path / 'hf'}"]
  with caplog.at_level(logging.WARNING):
    assert not cli.main(convert)
  said = [message for message in caplog.messages if "resizes learned positions in another way" in message]
  assert len(said) == 1 and "\n" not in said[0]
  for words in ("offset=0.0 for 0.1", "At 48 x 48 pixels nothing changes", "% of the largest"):
    assert words in said[0]
  loaded, again = vit_jax.load_model(tmp_path / "hf")
  assert loaded.position_table == dataclasses.replace(model.position_table, offset=0.0)
  native, other = (np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32) for side in (48, 80))
  both = {"ours": (model, params), "theirs": (loaded, again)}
  features = {name: [m.apply({"params": p}, batch).cls for batch in (native, other)] for name, (m, p) in both.items()}
  np.testing.assert_array_equal(features["ours"][0], features["theirs"][0])
  assert np.abs(features["ours"][1] - features["theirs"][1]).max() > 0
  positions = [m.position_table.resize(p["positions"][1:], (9, 9)) for m, p in both.values()]
  largest = float(said[0].split("by up to ")[1].split(",")[0])
  assert np.abs(positions[0] - positions[1]).max() <= largest * 1.01
  capsys.readouterr()
  assert cli.main([*convert, "--strict", "--overwrite"])
  assert "refused, as strict=True (--strict) asks" in capsys.readouterr().err
  with pytest.raises(WeightsError, match="refused"):
    vit_jax.save_model(tmp_path / "strict", model, params, strict=True)
  assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("format", ["safetensors", "pth", "timm"])
def test_what_is_resized_alike_is_said_to_nobody(tmp_path: pathlib.Path, caplog, format: str):
  table = PositionTable((6, 6), antialias=True)
  model, params, _ = dinov2_pth(tmp_path, num_registers=2, position_table=table)
  path = tmp_path / {"timm": "m.safetensors", "pth": "m.pth"}.get(format, "m")
  with caplog.at_level(logging.WARNING):
    vit_jax.save_model(path, model, params, format, strict=True)
  assert caplog.messages == []


def test_what_only_training_uses_is_left_out_and_said(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  model = DINOV3["vit7b"]
  for format, path in {"safetensors": "a", "timm": "b.safetensors"}.items():
    caplog.clear()
    vit_jax.save_model(tmp_path / path, model, random_params(model), format)
    assert any(r.levelno == logging.WARNING and "local_cls_norm, which only training uses" in r.message
               for r in caplog.records)  # fmt: skip


def test_convert_keeps_what_the_source_says_of_its_images(tmp_path: pathlib.Path):
  model, params = OTHERS["dinov2"], random_params(OTHERS["dinov2"])
  said = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40}, "crop_size": {"height": 24,
          "width": 24}, "do_center_crop": True, "do_resize": True, "resample": 3, "image_mean": [0.1, 0.2, 0.3],
          "image_std": [0.4, 0.5, 0.6], "do_normalize": True, "a_key_of_theirs": 7}  # fmt: skip
  vit_jax.save_model(tmp_path / "source", model, params, preprocessor=said)
  for format, path in {"safetensors": "a", "pth": "b.pth", "timm": "c.safetensors", "orbax": "d"}.items():
    arguments = [f"--from={tmp_path / 'source'}", f"--to={tmp_path / path}", f"--format={format}"]
    assert not cli.main(["convert", *arguments])
    assert hub.load_preprocessing(tmp_path / path) == hub.load_preprocessing(tmp_path / "source")
    assert not cli.main(["convert", f"--from={tmp_path / path}", f"--to={tmp_path / path}-again"])
    again = json.loads((tmp_path / f"{path}-again" / "preprocessor_config.json").read_text())
    assert again == said
