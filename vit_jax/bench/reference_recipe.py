"""The reference's multi-crop as its users run it, to be measured against: torchvision on Pillow images, or the same
operations in Pillow and SciPy where torchvision is not installed.
"""

from __future__ import annotations

import importlib.util
import io
import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from vit_jax.data.views import Views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Recipe = Callable[[bytes], list]


def reference_recipe(views: Views) -> tuple[str, Recipe]:
  """(its name, encoded image -> the normalised crops) for one thread."""
  if importlib.util.find_spec("torchvision"):
    return "torchvision recipe", _with_torchvision(views)
  return "the recipe in Pillow", _with_pillow(views)


def _with_torchvision(views: Views) -> Recipe:
  import torch
  from torchvision import transforms

  torch.set_num_threads(1)
  jitter = transforms.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)

  def crop(kind: int, size: int, scale: tuple[float, float]) -> Callable:
    blur = transforms.GaussianBlur(9, sigma=views.blur_sigma)
    return transforms.Compose(
      [
        transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(views.flip),
        transforms.RandomApply([jitter], p=views.jitter),
        transforms.RandomGrayscale(views.grayscale),
        transforms.RandomApply([blur], p=views.blur[kind]),
        transforms.RandomSolarize(128, p=views.solarize[kind]),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
      ]
    )

  return _over_crops(views, crop)


def _with_pillow(views: Views) -> Recipe:
  def crop(kind: int, size: int, scale: tuple[float, float]) -> Callable:
    def apply(image: Image.Image) -> np.ndarray:
      image = _resized_crop(image, size, scale)
      if random.random() < views.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
      if random.random() < views.jitter:
        image = _jittered(image, views)
      if random.random() < views.grayscale:
        image = image.convert("L").convert("RGB")
      if random.random() < views.blur[kind]:
        image = _blurred(image, random.uniform(*views.blur_sigma))
      if random.random() < views.solarize[kind]:
        image = ImageOps.solarize(image, 128)
      pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255.0
      return (pixels - np.array(MEAN, np.float32)[:, None, None]) / np.array(STD, np.float32)[:, None, None]

    return apply

  return _over_crops(views, crop)


def _over_crops(views: Views, crop: Callable) -> Recipe:
  parts = [crop(i, views.global_size, views.global_scale) for i in range(2)]
  parts += [crop(2, views.local_size, views.local_scale)] * views.local_number

  def recipe(data: bytes) -> list:
    image = Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB")
    return [part(image) for part in parts]

  return recipe


def _resized_crop(image: Image.Image, size: int, scale: tuple[float, float]) -> Image.Image:
  for _ in range(10):
    area = image.width * image.height * random.uniform(*scale)
    ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < width <= image.width and 0 < height <= image.height:
      break
  else:
    width = height = min(image.size)
  left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
  return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)


def _jittered(image: Image.Image, views: Views) -> Image.Image:
  def turned(image: Image.Image) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    moved = np.array(hue, np.uint8) + np.uint8(int(random.uniform(-views.hue, views.hue) * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(moved, "L"), saturation, value)).convert("RGB")

  def enhanced(kind: type, strength: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: kind(image).enhance(random.uniform(1.0 - strength, 1.0 + strength))

  steps = [
    enhanced(ImageEnhance.Brightness, views.brightness),
    enhanced(ImageEnhance.Contrast, views.contrast),
    enhanced(ImageEnhance.Color, views.saturation),
    turned,
  ]
  random.shuffle(steps)
  for step in steps:
    image = step(image)
  return image


def _blurred(image: Image.Image, sigma: float) -> Image.Image:
  """As torchvision does it: 81 taps at once, on floats."""
  taps = np.exp(-0.5 * (np.arange(-4, 5, dtype=np.float32) / sigma) ** 2)
  kernel = np.outer(taps, taps).astype(np.float32)
  pixels = np.asarray(image, np.float32)
  blurred = ndimage.correlate(pixels, (kernel / kernel.sum())[:, :, None], mode="mirror")
  return Image.fromarray(np.rint(blurred).astype(np.uint8))
