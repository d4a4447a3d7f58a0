"""Files that do not hold what they should: every layout says all that is wrong, once, and names the file."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import zipfile
from typing import Any

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax import hub
from vit_jax.models import ConvNeXt, PositionTable, Rope, VisionTransformer
from vit_jax.weights import WeightMismatch, WeightsError
from vit_jax.weights.files import INDEX, SINGLE, read_safetensors, write_safetensors
from vit_jax.weights.pth import read_pth, write_pth

SIZES = dict(patch_size=8, width=32, depth=3, num_heads=2)
DINOV3 = VisionTransformer(
  **SIZES, num_registers=2, layer_scale=1.0, mask_k_bias=True, norm_eps=1e-5, rope=Rope(rescale=2.0)
)
DINOV2 = VisionTransformer(**SIZES, rope=None, layer_scale=1.0, position_table=PositionTable((3, 3)))
VIT = VisionTransformer(**SIZES, rope=None, masking=False, position_table=PositionTable((3, 3)))
CONVNEXT = ConvNeXt(depths=(1, 1, 2, 1), widths=(8, 16, 16, 24))
LAYOUTS = {  # (model, file or folder, a tensor to lose, one to cut)
  "dinov3": (DINOV3, "m.pth", "blocks.1.attn.proj.bias", "blocks.0.mlp.fc1.weight"),
  "dinov3_swiglu": (DINOV3.clone(mlp="swiglu"), "m.pth", "blocks.0.mlp.w1.weight", "blocks.1.mlp.w2.bias"),
  "dinov3_convnext": (CONVNEXT, "m.pth", "stages.2.1.gamma", "downsample_layers.1.0.weight"),
  "dinov2": (DINOV2, "m.pth", "blocks.0.norm1.weight", "blocks.1.attn.qkv.weight"),
  "timm": (VIT, "m.safetensors", "blocks.0.mlp.fc2.weight", "blocks.1.norm1.weight"),
  "timm_eva": (
    DINOV3.clone(masking=False), "m.safetensors", "blocks.0.attn.q_bias", "reg_token"
  ),
  "hf_dinov3": (DINOV3, "m", "layer.0.attention.q_proj.weight", "embeddings.mask_token"),
  "hf_dinov3_convnext": (CONVNEXT, "m", "stages.2.layers.1.gamma", "stages.1.downsample_layers.0.weight"),
  "hf_dinov2": (DINOV2, "m", "layernorm.bias", "embeddings.position_embeddings"),
  "hf_dinov2_registers": (
    DINOV2.clone(num_registers=2, position_table=PositionTable((3, 3), antialias=True)),
    "m", "embeddings.register_tokens", "encoder.layer.1.mlp.fc2.weight",
  ),
  "hf_vit": (VIT, "m", "embeddings.cls_token", "encoder.layer.0.output.dense.weight"),
  "hf_deit": (
    VIT.clone(num_registers=1, position_table=PositionTable((3, 3), prefix="all"), pool="distilled"),
    "m", "embeddings.distillation_token", "encoder.layer.1.layernorm_after.bias",
  ),
}  # fmt: skip
HEADLESS = ("dinov2", "timm", "timm_eva")  # layouts in which the number of heads leaves no trace
FORMATS = {"m.pth": "pth", "m.safetensors": "timm", "m": "safetensors"}


def random_params(model: VisionTransformer | ConvNeXt) -> dict[str, Any]:
  image = np.zeros((1, model.stride, model.stride, model.in_channels), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def saved(folder: pathlib.Path, name: str) -> tuple[pathlib.Path, dict[str, np.ndarray], Any]:
  """A whole file or folder of a layout, its tensors, and a function that writes others in their place."""
  model, file, *_ = LAYOUTS[name]
  path = folder / file
  vit_jax.save_model(path, model, random_params(model), format=FORMATS[file], overwrite=True)
  if file == "m.pth":
    return path, read_pth(path), lambda tensors: write_pth(path, tensors)
  single = path / SINGLE if file == "m" else path
  return path, read_safetensors(single), lambda tensors: write_safetensors(single, tensors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_error_lists_all_that_does_not_fit(name: str, tmp_path: pathlib.Path):
  lost, cut = LAYOUTS[name][2:]
  path, tensors, write = saved(tmp_path, name)
  known = {"num_heads": 2} if name in HEADLESS else {}
  vit_jax.load_model(path, **known)
  broken = {key: value for key, value in tensors.items() if key != lost}
  broken[cut] = np.concatenate([tensors[cut]] * 2)
  write(broken | {"surplus": np.zeros(3, np.float32), "count": np.zeros(2, np.int64)})
  with pytest.raises(WeightMismatch) as caught:
    vit_jax.load_model(path, **known)
  message = str(caught.value)
  shape, longer = tuple(tensors[cut].shape), tuple(broken[cut].shape)
  for line in (
    f"{path}: ", f"missing: {lost} {tuple(tensors[lost].shape)}", f"shape: {cut} is {longer}, expected {shape}",
    "extra: surplus (3,)", "extra: count (2,)",
  ):  # fmt: skip
    assert line in message
  assert "4 tensors" in message


@pytest.mark.parametrize("name", LAYOUTS)
def test_integers_are_no_weights(name: str, tmp_path: pathlib.Path):
  cut = LAYOUTS[name][3]
  path, tensors, write = saved(tmp_path, name)
  known = {"num_heads": 2} if name in HEADLESS else {}
  write(tensors | {cut: tensors[cut].astype(np.uint8)})
  with pytest.raises(WeightMismatch, match=f"type: {cut} is uint8, expected floating-point"):
    vit_jax.load_model(path, **known)


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_architecture_is_an_error_that_names_its_tensors(name: str, tmp_path: pathlib.Path):
  model = LAYOUTS[name][0]
  path, *_ = saved(tmp_path, name)
  other = {"widths": (8, 16, 16, 32)} if isinstance(model, ConvNeXt) else {"depth": 4}
  with pytest.raises(WeightMismatch, match=r"shape: .* expected|missing: .*3\.") as caught:
    vit_jax.load_model(path, **other)
  assert len(str(caught.value).splitlines()) > 5


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 86404824\n"


@pytest.mark.parametrize("name", ["dinov3", "timm", "hf_dinov3"])
def test_cut_empty_and_unfetched_files_are_named(name: str, tmp_path: pathlib.Path):
  path, *_ = saved(tmp_path, name)
  file = path / SINGLE if path.is_dir() else path
  whole = file.read_bytes()
  for content in (whole[: len(whole) // 2], whole[:-1], whole[:4], b"", b"<html>not found</html>"):
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"(not a readable safetensors|not a PyTorch file).* cut short"):
      vit_jax.load_model(path)
  file.write_bytes(POINTER)
  with pytest.raises(WeightsError, match=f"{file.name} is a Git LFS pointer, not the weights: .*git lfs pull"):
    vit_jax.load_model(path)


class Malicious:
  def __reduce__(self):
    return os.system, ("touch executed",)


def test_a_pickle_that_would_run_code_does_not(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.chdir(tmp_path)
  path, *_ = saved(tmp_path, "dinov3")
  with zipfile.ZipFile(path) as file:
    records = {name: file.read(name) for name in file.namelist()}
  tensors = records["archive/data.pkl"]
  payload = pickle.dumps(Malicious(), protocol=2)[2:-1]  # without its header and stop
  harmless = b"\x80\x02}(X\x01\x00\x00\x00x" + payload + tensors[4:]
  for content in (pickle.dumps(Malicious(), protocol=2), harmless):
    with zipfile.ZipFile(path, "w") as file:
      for name, record in (records | {"archive/data.pkl": content}).items():
        file.writestr(name, record)
    with pytest.raises(WeightsError, match=r"m\.pth cannot be read: it contains (posix|nt)\.system; only tensors"):
      vit_jax.load_model(path)
  assert not (tmp_path / "executed").exists()


def test_other_contents_of_a_pickle_are_named(tmp_path: pathlib.Path):
  write_pth(tmp_path / "m.pth", {})
  with pytest.raises(WeightsError, match=r"m\.pth: not a backbone of DINOv3, DINOv2 or timm: .*; it has nothing"):
    vit_jax.load_model(tmp_path / "m.pth")
  with zipfile.ZipFile(tmp_path / "m.pth", "w") as file:
    file.writestr("x/data.pkl", pickle.dumps("weights", protocol=2))
  with pytest.raises(WeightsError, match=r"m\.pth holds a .*, not a dict of tensors"):
    vit_jax.load_model(tmp_path / "m.pth")
  write_pth(tmp_path / "m.pth", {"fc.weight": np.zeros((2, 2), np.float32)})
  with pytest.raises(WeightsError, match=r"it has fc\.weight"):
    vit_jax.load_model(tmp_path / "m.pth")


def test_what_tells_the_architecture_must_be_whole(tmp_path: pathlib.Path):
  for name, tensor, message in (
    ("dinov3", "patch_embed.proj.weight", "patch_embed.proj.weight is missing"),
    ("dinov3", "rope_embed.periods", "rope_embed.periods is missing"),
    ("dinov2", "patch_embed.proj.weight", "patch_embed.proj.weight is missing"),
    ("dinov3_convnext", "downsample_layers.0.0.weight", "downsample_layers.0.0.weight is missing"),
  ):
    path, tensors, write = saved(tmp_path, name)
    write({key: value for key, value in tensors.items() if key != tensor})
    with pytest.raises(WeightsError, match=f"m.pth: cannot tell which model this is: {message}"):
      vit_jax.load_model(path)
    write(tensors | {tensor: tensors[tensor][None]})
    with pytest.raises(WeightsError, match=rf"m.pth: cannot tell which model this is: {tensor} is \(1, "):
      vit_jax.load_model(path)


def test_folders_without_weights_say_what_is_there(tmp_path: pathlib.Path):
  with pytest.raises(hub.UnknownModel, match="nothing of this name"):
    vit_jax.load_model(tmp_path / "none")
  with pytest.raises(hub.UnknownModel, match="The folder is empty"):
    vit_jax.load_model(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "vit"}')
  (tmp_path / "vit.pth").write_bytes(b"")
  with pytest.raises(hub.UnknownModel, match=r"has config\.json, vit\.pth\. Of a file like vit\.pth, give the path"):
    vit_jax.load_model(tmp_path)


def test_shards_that_are_missing_or_not_what_the_index_says_are_named(tmp_path: pathlib.Path):
  path = tmp_path / "m"
  vit_jax.save_model(path, DINOV3, random_params(DINOV3), max_shard_size=40_000)
  index = json.loads((path / INDEX).read_text())
  names = sorted(set(index["weight_map"].values()))
  assert len(names) > 2
  shard = (path / names[1]).read_bytes()
  (path / names[1]).unlink()
  with pytest.raises(WeightsError, match=f"m lacks 1 of the {len(names)} files of its index: {names[1]}"):
    vit_jax.load_model(path)
  (path / names[1]).write_bytes(POINTER)
  with pytest.raises(WeightsError, match=f"{names[1]} is a Git LFS pointer"):
    vit_jax.load_model(path)
  (path / names[1]).write_bytes(shard)
  moved = next(name for name, file in index["weight_map"].items() if file == names[1])
  (path / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {moved: names[0]}}))
  with pytest.raises(WeightsError, match=f"{INDEX} and its files disagree: .*{moved} .in {names[0]}"):
    vit_jax.load_model(path)
  for content in ("not json", "{}", "[]"):
    (path / INDEX).write_text(content)
    with pytest.raises(WeightsError, match=f"{INDEX} is not an index of shards"):
      vit_jax.load_model(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "config.json is no JSON"),
    ('{"model_type": "dinov3_vit", "num_attention_heads": 5}', "m: num_heads=5: must divide width=384"),
    ('{"model_type": "dinov3_vit", "query_bias": false}', "config.json: .*query_bias=False with value_bias=True"),
    (POINTER.decode(), "config.json is a Git LFS pointer"),
  ],
)
def test_broken_configurations_are_named(content: str, message: str, tmp_path: pathlib.Path):
  path, *_ = saved(tmp_path, "hf_dinov3")
  (path / "config.json").write_text(content)
  with pytest.raises(WeightsError, match=message):
    vit_jax.load_model(path)


def test_the_wrong_configuration_beside_good_weights_is_a_mismatch(tmp_path: pathlib.Path):
  path, *_ = saved(tmp_path, "hf_vit")
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
  with pytest.raises(WeightMismatch, match=r"shape: embeddings\.cls_token is \(1, 1, 32\), expected \(1, 1, 48\)"):
    vit_jax.load_model(path)
  (path / "config.json").write_text(json.dumps(config | {"model_type": "dinov3_vit"}))
  with pytest.raises(WeightMismatch, match=r"missing: layer\.0\.norm1\.weight"):
    vit_jax.load_model(path)
