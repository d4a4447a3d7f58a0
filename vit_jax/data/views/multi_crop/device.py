"""The multi-crop on the device: what `host.py` does on the host, for a whole batch within the compiled step.

A batch that is to be augmented here holds images as they were decoded, each in the top left corner of a canvas, and
the random numbers that `host.py` would have used for it: they belong to the seed and the image's place in the
stream. So neither the number of devices nor an interruption changes a crop, and both paths cut and distort alike, up
to the rounding of float32.

Only levels of 8 bits leave this file, so that a training method cannot tell which path made its crops.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from vit_jax.data.views.multi_crop import host
from vit_jax.data.views.multi_crop.parameters import NUM_GLOBAL, Parameters
from vit_jax.ops import colours
from vit_jax.ops.blur import gaussian_blur
from vit_jax.ops.cropping import crop_weights, resample, resize

_CHUNK = 32  # images at a time on one device: bounds what lies between the two products, 8 MB an image at full size

Levels = Float[Array, "B K C h w"]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("box", "flip", "order", "factors", "grayscale", "sigma", "solarize", "window"),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Crops:
  """Everything that was drawn for K crops of each of B images; `host.Crop` for all of them at once.

  Attributes:
    box: top, left, height, width in pixels of the image, int32 [B, K, 4].
    flip: a mirror image, bool [B, K].
    order: the colour adjustments in the order of application, numbers of `ops.colours`, int32 [B, K, 4].
    factors: of each adjustment, by its number, float32 [B, K, 4].
    grayscale: without colour, bool [B, K].
    sigma: of the blur in pixels, 0: none, float32 [B, K].
    solarize: values from 128 on inverted, bool [B, K].
    window: place (top, left) of a local crop inside a global one, int32 [B, K, 2].
  """

  box: Int[Array, "B K 4"]
  flip: Bool[Array, "B K"]
  order: Int[Array, "B K 4"]
  factors: Float[Array, "B K 4"]
  grayscale: Bool[Array, "B K"]
  sigma: Float[Array, "B K"]
  solarize: Bool[Array, "B K"]
  window: Int[Array, "B K 2"]

  def __getitem__(self, crops: slice) -> Crops:
    """Some of the K crops."""
    return jax.tree.map(lambda x: x[:, crops], self)


def augmented(
  canvas: UInt8[Array, "B Hc Wc C"],
  valid: Int[Array, "B 2"],
  random: Float[Array, "B R U"],
  views: Parameters,
  mesh: jax.sharding.Mesh | None = None,
  axes: Any = None,
) -> dict[str, UInt8[Array, "B K h w C"]]:
  """`make_crops` on a mesh: every device makes the crops of its own images.

  Args:
    canvas, valid, random, views: as `make_crops`.
    mesh: over which the leading axis is spread; None: one device.
    axes: of the mesh, over which it is spread.
  """
  make = functools.partial(make_crops, views=views)
  if mesh is not None:
    spec = jax.sharding.PartitionSpec(axes)
    make = jax.shard_map(make, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  with jax.named_scope("augment"):
    return make(canvas, valid, random)


def make_crops(
  canvas: UInt8[Array, "B Hc Wc C"], valid: Int[Array, "B 2"], random: Float[Array, "B R U"], views: Parameters
) -> dict[str, UInt8[Array, "B K h w C"]]:
  """The crops of images of one resolution.

  Args:
    canvas: the images, each in the top left corner.
    valid: height and width of each.
    random: numbers from 0 to 1, as `host.random_numbers` draws them.
    views: what crops.
  """
  rows = canvas.shape[0]
  chunk = next(size for size in range(min(rows, _CHUNK), 0, -1) if rows % size == 0)
  make = functools.partial(_crops_of, views=views)
  if chunk == rows:
    return make(canvas, valid, random)
  parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (canvas, valid, random))
  made = jax.lax.map(lambda part: make(*part), parts)
  return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), made)


def draw(random: Float[Array, "B R U"], valid: Int[Array, "B 2"], views: Parameters) -> Crops:
  """The parameters of the crops of each image, by the arithmetic of `host.draw_crops`: global, then local ones."""
  n = views.local_number
  random = random[:, : NUM_GLOBAL + n]  # what is left is for the image as a whole
  scales = np.array([views.global_scale] * NUM_GLOBAL + [views.local_scale] * n, np.float32)  # [K, 2]
  box = _boxes(random, valid, scales)
  numbers = random[..., host.PLACES :]  # flip, colours, blurred, sigma, inverted
  flip = numbers[..., 0] < views.flip
  if views.local_inside_global:  # half of them lie in each global crop, and share its box and its flip
    base = np.array([0, 1, *(2 * i // n for i in range(n))])
    box, flip = box[:, base], flip[:, base]
  order, factors, gray = draw_colours(numbers[..., 1 : 1 + host.COLOURS], views)
  if views.share_color_jitter:
    order, gray = jnp.full_like(order, colours.NOTHING), jnp.zeros_like(gray)
  blurred, sigma, inverted = (numbers[..., 1 + host.COLOURS + i] for i in range(3))
  kinds = np.array([0, 1, *[2] * n])
  places = max(1, (views.global_size - views.local_size) // views.stride)
  window = jnp.floor(random[..., host.PLACES - 2 : host.PLACES] * places).astype(jnp.int32)
  return Crops(
    box=box,
    flip=flip,
    order=order,
    factors=factors,
    grayscale=gray,
    sigma=jnp.where(blurred < np.array(views.blur, np.float32)[kinds], _between(sigma, *views.blur_sigma), 0.0),
    solarize=inverted < np.array(views.solarize, np.float32)[kinds],
    window=views.stride * jnp.minimum(window, places - 1),
  )


def draw_colours(
  numbers: Float[Array, "... 7"], views: Parameters
) -> tuple[Int[Array, "... 4"], Float[Array, "... 4"], Bool[Array, " ..."]]:
  """(order, factors, grayscale) as in `Crops`."""
  jitter, order, *factors, gray = jnp.moveaxis(numbers, -1, 0)
  strengths = (views.brightness, views.contrast, views.saturation)
  drawn = [_between(u, max(0.0, 1.0 - x), 1.0 + x) for u, x in zip(factors, strengths, strict=False)]
  drawn.append(_between(factors[3], -views.hue, views.hue))
  orders = np.array(host.ORDERS, np.int32)
  which = jnp.asarray(orders)[jnp.minimum((order * len(orders)).astype(jnp.int32), len(orders) - 1)]  # [..., 4]
  unused = np.array([x <= 0.0 for x in (*strengths, views.hue)])
  skipped = (jitter >= views.jitter)[..., None] | jnp.asarray(unused)[which]
  return jnp.where(skipped, colours.NOTHING, which), jnp.stack(drawn, -1), gray < views.grayscale


def _boxes(random: Float[Array, "B K U"], valid: Int[Array, "B 2"], scales: np.ndarray) -> Int[Array, "B K 4"]:
  """The first proposal that fits into the image, or else the largest centred box of an allowed aspect."""
  tries = host.TRIES
  height, width = (valid[:, i, None].astype(jnp.float32) for i in range(2))  # [B, 1]
  area = (height * width)[..., None] * _between(random[..., 0 : 2 * tries : 2], scales[:, :1], scales[:, 1:])
  ratio = jnp.exp(_between(random[..., 1 : 2 * tries : 2], *host.LOG_RATIO))  # [B, K, tries]
  w, h = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
  fits = (w > 0) & (w <= width[..., None]) & (h > 0) & (h <= height[..., None])
  first = jnp.argmax(fits, -1)[..., None]
  w, h = (jnp.take_along_axis(x, first, -1)[..., 0] for x in (w, h))  # [B, K]
  top, left = (
    jnp.minimum(jnp.floor(random[..., host.PLACES - 2 + i] * (room + 1)), room)
    for i, room in enumerate((height - h, width - w))
  )
  tallest = jnp.where(width / height < 3 / 4, jnp.round(width / (3 / 4)), height)  # [B, 1]
  widest = jnp.where(width / height > 4 / 3, jnp.round(height * (4 / 3)), width)
  centred = (jnp.floor((height - tallest) / 2), jnp.floor((width - widest) / 2), tallest, widest)
  found = jnp.any(fits, -1)  # [B, K]
  box = [jnp.where(found, x, centre) for x, centre in zip((top, left, h, w), centred, strict=True)]
  return jnp.stack(box, -1).astype(jnp.int32)


def _between(uniform: Array, low: Any, high: Any) -> Array:
  return low + uniform * (high - low)


def _crops_of(canvas: Array, valid: Array, random: Array, views: Parameters) -> dict[str, Array]:
  crops = draw(random, valid, views)
  images = jnp.moveaxis(canvas, -1, 1).astype(jnp.float32)  # [B, C, Hc, Wc]
  if views.share_color_jitter:
    images = _shared_colours(images, valid, random[:, -1, : host.COLOURS], views)
  both = crops[:NUM_GLOBAL]
  base = _cut(images, both, views.base_size)  # [B, 2, C, H, W]
  plain = resize(base, views.global_size)
  shared = views.gram_size is not None and views.gram_distortions
  made = {}
  if shared:
    base = distort(base, both, views)
    made["global_crops"] = resize(base, views.global_size)
  else:
    made["global_crops"] = distort(plain, both, views)
  if views.gram_size is not None:
    made["gram_crops"] = resize(base, views.gram_size)
  local = crops[NUM_GLOBAL:]
  if views.local_number and views.local_inside_global:
    half = views.local_number // 2
    whole = distort(jnp.repeat(plain, half, axis=1, total_repeat_length=2 * half), local, views)
    made["local_crops"] = _windows(whole, local.window, views.local_size)
  elif views.local_number:
    made["local_crops"] = distort(_cut(images, local, views.local_size), local, views)
  else:
    made["local_crops"] = jnp.zeros((len(canvas), 0, images.shape[1], views.local_size, views.local_size))
  return {name: jnp.moveaxis(x, 2, -1).astype(jnp.uint8) for name, x in made.items()}


def _cut(images: Float[Array, "B C Hc Wc"], crops: Crops, size: int) -> Levels:
  top, left, height, width = jnp.moveaxis(crops.box, -1, 0)  # [B, K]
  rows = crop_weights(top, height, size, images.shape[-2])
  columns = crop_weights(left, width, size, images.shape[-1], crops.flip)
  return resample(images, rows, columns)


def distort(image: Levels, crops: Crops, views: Parameters) -> Levels:
  """The photometric part, on crops that are flipped already: nothing in it knows left from right."""
  if views.jitter > 0.0 and not views.share_color_jitter:
    image = _jitter(image, crops.order, crops.factors, views)
  if views.grayscale > 0.0 and not views.share_color_jitter:
    image = jnp.where(_wide(crops.grayscale), colours.grayscale(image), image)
  if any(views.blur):
    image = gaussian_blur(image, crops.sigma)
  if any(views.solarize):
    image = jnp.where(_wide(crops.solarize), colours.solarize(image), image)
  return image


def _jitter(image: Array, order: Array, factors: Array, views: Parameters, valid: Array | None = None) -> Array:
  def adjusted(place: Array, image: Array) -> Array:
    which = order[..., place]
    factor = jnp.take_along_axis(factors, jnp.minimum(which, 3)[..., None], -1)[..., 0]
    return colours.adjust(image, which, factor, hue=views.hue > 0.0, valid=valid)

  return jax.lax.fori_loop(0, 4, adjusted, image)  # a loop, as four copies would quadruple the time to compile


def _shared_colours(
  images: Float[Array, "B C Hc Wc"], valid: Array, numbers: Float[Array, "B 7"], views: Parameters
) -> Array:
  """Jitter and grayscale of the whole images; what of the canvas lies outside them does not count."""
  order, factors, gray = draw_colours(numbers, views)
  rows, columns = (jnp.arange(n) < valid[:, i, None] for i, n in enumerate(images.shape[-2:]))
  images = _jitter(images, order, factors, views, valid=rows[:, :, None] & columns[:, None, :])
  return jnp.where(_wide(gray), colours.grayscale(images), images)


def _wide(x: Array) -> Array:
  """[...] against [..., C, H, W]."""
  return x[..., None, None, None]


def _windows(whole: Levels, places: Int[Array, "B K 2"], size: int) -> Levels:
  def window(image: Float[Array, "C H W"], place: Int[Array, " 2"]) -> Array:
    return jax.lax.dynamic_slice(image, (0, place[0], place[1]), (image.shape[0], size, size))

  return jax.vmap(jax.vmap(window))(whole, places)
