"""Images as a model takes them: as it was evaluated, as its export says to others, and as others say of theirs."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests.test_hub import random_params
from vit_jax import cli, config, hub, methods
from vit_jax.checkpoints import Checkpoints
from vit_jax.data.decode import BadImage
from vit_jax.data.evaluation_batches import evaluation_batches
from vit_jax.data.framing import standard
from vit_jax.models import VisionTransformer
from vit_jax.weights import WeightsError
from vit_jax.weights.preprocessor import from_preprocessor

MODEL = VisionTransformer(patch_size=8, width=32, depth=1, num_heads=2, num_registers=2, layer_scale=1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVEL = 1 / 255
# Height and width: portrait, landscape, panoramas, of exactly the size, to be enlarged, odd.
SHAPES = [(90, 60), (60, 91), (20, 200), (300, 24), (48, 48), (48, 77), (55, 55), (31, 57), (9, 40), (113, 111)]


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
  """Smooth colours, edges and some noise, with black and white in them."""
  rng = np.random.default_rng(seed)
  rows, columns = np.mgrid[0:height, 0:width]
  waves = [np.sin(rows / (3 + i) + columns / (5 - i)) for i in range(3)]
  edges = 90.0 * ((rows // 7 + columns // 5) % 2)
  values = np.stack(waves, -1) * 90 + edges[..., None] + 90 + rng.normal(0, 9, (height, width, 3))
  return np.clip(values, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
  folder = tmp_path_factory.mktemp("photographs")
  pictures = {f"{height}x{width}.png": Image.fromarray(photograph(height, width)) for height, width in SHAPES}
  pictures["grey.png"] = pictures["60x91.png"].convert("L")
  pictures["opaque.png"] = pictures["90x60.png"].convert("RGBA")
  for name, picture in pictures.items():
    picture.save(folder / name)
  turned = Image.Exif()
  turned[0x0112] = 6
  pictures["60x91.png"].save(folder / "turned.jpg", exif=turned)
  return sorted(folder.iterdir())


def save(path: pathlib.Path, **said: Any) -> pathlib.Path:
  vit_jax.save_model(path, MODEL, random_params(MODEL), **said)
  return path


def with_preprocessor(path: pathlib.Path, values: dict[str, Any]) -> pathlib.Path:
  save(path)
  (path / "preprocessor_config.json").write_text(json.dumps(values))
  return path


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("crop_ratio", [None, 1.0])
def test_auto_image_processor_makes_of_an_export_what_load_images_makes(
  tmp_path: pathlib.Path, photographs: list[pathlib.Path], backend: str, crop_ratio: float | None
):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torchvision")
  path = save(tmp_path / "m", mean=MEAN, std=STD, image_size=48, crop_ratio=crop_ratio)
  processor = transformers.AutoImageProcessor.from_pretrained(path, use_fast=backend == "torchvision")
  for file in photographs:
    image = transformers.image_utils.load_image(str(file))
    theirs = processor(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    ours = np.asarray(vit_jax.load_images(file, like=path))
    assert ours.shape == theirs.shape == (1, 48, 48, 3)
    assert np.abs((ours - theirs) * STD).max() <= LEVEL * 1.001, file.name


def test_what_is_evaluated_is_what_load_images_makes(tmp_path: pathlib.Path, photographs: list[pathlib.Path]):
  class Files:
    num_classes, class_names = 0, ()
    __len__ = lambda self: len(photographs)  # noqa: E731
    describe = lambda self, index: str(photographs[index])  # noqa: E731
    __getitem__ = lambda self, index: {"image": photographs[index].read_bytes(), "label": -1}  # noqa: E731

  for ratio in (None, 0.8):
    path = save(tmp_path / f"{ratio}", mean=MEAN, std=STD, image_size=48, crop_ratio=ratio)
    seen = hub.load_preprocessing(path)
    options = dict(image_size=48, batch_size=32, max_examples=32, crop_ratio=seen.crop_ratio)
    batch = next(evaluation_batches(Files(), **options))
    evaluated = (batch["images"][batch["valid"]] / 255 - MEAN) / np.array(STD)
    np.testing.assert_allclose(vit_jax.load_images(photographs, like=path), evaluated, atol=1e-5)


@pytest.mark.parametrize("ratio", [1.0, 0.875])
def test_a_run_and_its_export_take_the_same_images(tmp_path: pathlib.Path, ratio: float):
  c = config.default()
  with c.unlocked():
    c.model.update(patch_size=8, width=32, depth=1, num_heads=2, mlp_hidden=64, num_registers=1)
    c.crops.global_size, c.evaluation.crop_ratio = 48, ratio
  state = {"teacher": {"backbone": random_params(methods.backbone(c))}}
  with Checkpoints(tmp_path / "run") as saved:
    saved.save(1, state, {}, config.to_dict(c), {})
  assert not cli.main(["export", f"--model={tmp_path / 'run'}", f"--to={tmp_path / 'm'}"])
  assert hub.load_preprocessing(tmp_path / "run") == hub.load_preprocessing(tmp_path / "m")
  images = [photograph(*shape) for shape in SHAPES]
  ours, theirs = (vit_jax.load_images(images, like=tmp_path / name) for name in ("run", "m"))
  np.testing.assert_array_equal(ours, theirs)
  if ratio == 1.0:
    np.testing.assert_allclose(ours[SHAPES.index((48, 48))], (photograph(48, 48) / 255 - MEAN) / STD, atol=1e-5)


def test_images_are_made_as_the_model_was_trained_on_them(tmp_path: pathlib.Path):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  files = [tmp_path / "a.png", tmp_path / "b.png"]
  for file, image in zip(files, (pixels, pixels[:, ::-1]), strict=True):
    Image.fromarray(image).save(file)
  seen = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "image_size": 40, "crop_ratio": 1.0}
  path = save(tmp_path / "m", **seen)
  images = vit_jax.load_images(files, like=path)
  assert images.shape == (2, 40, 40, 3) and images.dtype == jnp.float32
  expected = (pixels[:, 10:50] / 255 - np.array(seen["mean"])) / seen["std"]
  np.testing.assert_allclose(images[0], expected, atol=1e-5)
  assert vit_jax.load_images(files[:1], like=path, size=32).shape == (1, 32, 32, 3)
  (tmp_path / "bad.jpg").write_bytes(b"no image")
  with pytest.raises(BadImage, match=r"bad\.jpg: is no image"):
    vit_jax.load_images([tmp_path / "bad.jpg"], like=path)


def test_load_images_takes_whatever_is_an_image(tmp_path: pathlib.Path):
  pixels = photograph(60, 90)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  path = save(tmp_path / "m", mean=MEAN, std=STD, image_size=48)
  expected = vit_jax.load_images([tmp_path / "a.png"], like=path)
  picture = Image.fromarray(pixels)
  with Image.open(tmp_path / "a.png") as opened:
    for one in (str(tmp_path / "a.png"), tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), picture, opened, pixels,
                jnp.asarray(pixels), (pixels / 255).astype(np.float32), picture.convert("RGBA")):  # fmt: skip
      for given in (one, [one], (one,), (image for image in [one])):
        np.testing.assert_allclose(vit_jax.load_images(given, like=path), expected, atol=1e-6)
  with (tmp_path / "a.png").open("rb") as opened:
    np.testing.assert_array_equal(vit_jax.load_images(opened, like=path), expected)
  both = vit_jax.load_images(np.stack([pixels, pixels]), like=path)
  np.testing.assert_array_equal(both, np.concatenate([expected] * 2))
  turned = Image.Exif()
  turned[0x0112] = 3
  Image.fromarray(pixels[::-1, ::-1]).save(tmp_path / "turned.png", exif=turned)
  with Image.open(tmp_path / "turned.png") as opened:
    np.testing.assert_array_equal(vit_jax.load_images(opened, like=path), expected)
  grey = vit_jax.load_images([picture.convert("L"), picture.convert("P"), pixels[..., 0]], like=path)
  assert grey.shape == (3, 48, 48, 3)
  assert vit_jax.load_images(pixels, like=path, size=(32, 64)).shape == (1, 32, 64, 3)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ([], "the list is empty"),
    ((), "the list is empty"),
    (3, "takes paths, images of Pillow or arrays, not int"),
    ([3.5], "image 0 of the list is a float"),
    ([None], "image 0 of the list is a NoneType"),
    (np.full((9, 9, 3), 200.0), "image 0 of the list is float64 from 200 to 200: give uint8, or floats of 0 to 1"),
  ],
)
def test_what_is_no_image_is_said(tmp_path: pathlib.Path, given: Any, message: str):
  path = save(tmp_path / "m", mean=MEAN, std=STD)
  with pytest.raises(ValueError, match=message):
    vit_jax.load_images(given, like=path)
  with pytest.raises(BadImage, match="is a folder: give the files in it"):
    vit_jax.load_images(tmp_path, like=path)
  with pytest.raises(hub.UnknownModel, match="there is no model of this name"):
    vit_jax.load_images(tmp_path / "a.png", like=tmp_path / "nothing")
  for size in (0, (1, 2, 3), "224", 224.0):
    with pytest.raises(ValueError, match="must be pixels a side"):
      vit_jax.load_images(np.zeros((9, 9, 3), np.uint8), like=path, size=size)


NORMAL = {"do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD)}
OTHERS = {  # as they are published
  "dinov2": {"image_processor_type": "BitImageProcessor", "do_center_crop": True, "do_resize": True, "resample": 3,
             "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}, "do_rescale": True,
             "rescale_factor": 0.00392156862745098, "do_convert_rgb": True} | NORMAL,
  "dinov3": {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True, "resample": 2,
             "size": {"height": 32, "width": 40}, "do_rescale": True, "rescale_factor": 1 / 255} | NORMAL,
  "vit": {"feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "resample": 2, "size": 32} | NORMAL,
  "vit of half": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": True,
                  "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                  "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
  "vit, not normalised": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
                          "do_resize": True, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 127.5,
                          "do_normalize": False},
  "deit": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 40, "width": 40}, "resample": 3,
           "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_resize": True} | NORMAL,
  "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "resample": 3,
           "crop_size": {"height": 32, "width": 24}, "do_center_crop": True, "do_resize": True} | NORMAL,
  "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.8,
               "do_resize": True, "resample": 3} | NORMAL,
  "large convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "resample": 3,
                     "do_resize": True} | NORMAL,
  "no resizing": {"image_processor_type": "BitImageProcessor", "do_resize": False, "do_center_crop": True,
                  "crop_size": {"height": 24, "width": 24}} | NORMAL,
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_others_say_of_their_images_is_followed(tmp_path: pathlib.Path, kind: str):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torchvision")
  path = with_preprocessor(tmp_path / "m", OTHERS[kind])
  processor = transformers.AutoImageProcessor.from_pretrained(path)
  std = np.array(OTHERS[kind].get("image_std", [0.5] * 3))
  for shape in ((60, 91), (90, 60), (31, 57)):
    image = photograph(*shape)
    theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    ours = np.asarray(vit_jax.load_images(image, like=path))
    assert ours.shape == theirs.shape
    assert np.abs((ours - theirs) * std).max() <= LEVEL * 1.5  # they resize without rounding, Pillow rounds twice


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"do_pad": True}, "do_pad=True"),
    ({"do_flip_channel_order": True}, "do_flip_channel_order=True"),
    ({"size": {"longest_edge": 32}}, "size={'longest_edge': 32}"),
    ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "size="),
    ({"resample": 9}, "resample=9"),
    ({"image_processor_type": "NewImageProcessor", "size": 32}, "size=32"),
    ({"crop_pct": 0.9}, "crop_pct=0.9"),
    ({"size_divisor": 32}, "size_divisor=32"),
  ],
)
def test_what_cannot_be_followed_is_said_and_kept(tmp_path: pathlib.Path, change: dict, said: str):
  values = {"image_processor_type": "ViTImageProcessor", "resample": 2, "size": {"height": 32, "width": 32}} | NORMAL
  path = with_preprocessor(tmp_path / "m", values | change)
  with pytest.raises(hub.UnknownModel, match="cannot follow: ") as caught:
    vit_jax.load_images(photograph(40, 40), like=path)
  assert said in str(caught.value) and "AutoImageProcessor" in str(caught.value)
  assert hub.load_preprocessing(path).mean == MEAN  # which models and evaluations still need
  assert not cli.main(["convert", f"--from={path}", f"--to={tmp_path / 'again'}"])
  assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()) == values | change


def test_a_preprocessor_of_nonsense_is_an_error_in_words(tmp_path: pathlib.Path):
  for values in ({}, {"size": 224}, {"size": "large", **NORMAL}, {"size": {}, **NORMAL}, {"image_mean": None}):
    with pytest.raises(WeightsError, match=r"preprocessor_config\.json"):
      from_preprocessor(values)
  path = with_preprocessor(tmp_path / "m", {})
  (path / "preprocessor_config.json").write_text("[1]")
  with pytest.raises(WeightsError, match="is no JSON object"):
    vit_jax.load_images(photograph(9, 9), like=path)


def test_images_of_a_short_side_alone_are_one_batch_if_they_have_one_shape(tmp_path: pathlib.Path):
  values = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False}
  path = with_preprocessor(tmp_path / "m", values | NORMAL)
  assert vit_jax.load_images(photograph(64, 96), like=path).shape == (1, 32, 48, 3)
  with pytest.raises(ValueError, match="gives images of 32x48, 48x32: load them one by one"):
    vit_jax.load_images([photograph(64, 96), photograph(96, 64)], like=path)


def test_exports_of_older_versions_take_images_as_they_did(tmp_path: pathlib.Path):
  """Our single files once said what nobody had evaluated: DINOv3's processor, whatever the images had been."""
  older = OTHERS["dinov3"] | {"size": {"height": 32, "width": 32}, "data_format": "channels_first"}
  path = tmp_path / "m.pth"
  vit_jax.save_model(path, MODEL, random_params(MODEL), "pth", preprocessor=older)
  assert hub.load_preprocessing(path) == hub.Preprocessing(MEAN, STD, 32)
  image = photograph(60, 90)
  ours = vit_jax.load_images(image, like=path)
  np.testing.assert_allclose(ours[0], (standard(32)(image) / 255 - MEAN) / STD, atol=1e-5)
  assert not cli.main(["convert", f"--from={path}", f"--to={tmp_path / 'm'}"])
  assert hub.load_preprocessing(tmp_path / "m").framing == standard(32)


def test_timms_configuration_says_how_its_images_are_made(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  model = MODEL.clone(masking=False, mask_k_bias=True)
  vit_jax.save_model(tmp_path / "model.safetensors", model, random_params(model), "timm")
  said = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.4] * 3}
  (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": said}))
  with caplog.at_level(logging.WARNING):
    seen = hub.load_preprocessing(tmp_path)
  assert seen.mean == (0.5,) * 3 and seen.std == (0.4,) * 3 and seen.framing.resize == 35 and seen.image_size == 32
  (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": said | {"crop_mode": "squash"}}))
  seen = hub.load_preprocessing(tmp_path)
  assert not cli.main(["convert", f"--from={tmp_path}", f"--to={tmp_path / 'hf'}"])
  assert hub.load_preprocessing(tmp_path / "hf") == seen and seen.framing.resize == (35, 35)
  (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": said | {"crop_mode": "border"}}))
  with pytest.raises(hub.UnknownModel, match="crop_mode='border'"):
    vit_jax.load_images(photograph(9, 9), like=tmp_path)
