"""ConvNeXt (Liu et al. 2022) as DINOv3 distils into it: the same calls and features as a Vision Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_jax.models.backbone import Backbone
from vit_jax.models.blocks import add_branch, draw_kept
from vit_jax.models.features import Draws, Features
from vit_jax.models.inputs import check_images
from vit_jax.models.layers import LayerScale, linear_init, make_norm, spread
from vit_jax.models.mlp import GeluMlp
from vit_jax.models.patches import PatchEmbed
from vit_jax.models.remat import block_inputs, check_remat, recomputed
from vit_jax.ops.normalize import upcast
from vit_jax.ops.resize import resize_map


class Downsample(nn.Module):
  """A strided convolution without overlap, with a norm before it, or behind it in the stem."""

  factor: int
  width: int
  stem: bool
  norm_eps: float
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    norm = make_norm("layernorm", eps=self.norm_eps, name="norm", **types)
    init = {"kernel_init": linear_init, "bias_init": nn.initializers.zeros}
    embed = PatchEmbed(self.factor, self.width, name="conv", **init, **types)
    grid = x.shape[1] // self.factor, x.shape[2] // self.factor
    y = norm(embed(x)) if self.stem else embed(norm(x))
    return y.reshape(x.shape[0], *grid, self.width)


class DepthwiseConv(nn.Module):
  """A 7x7 convolution of every channel by itself, the map padded with zeros."""

  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
    width = x.shape[-1]
    kernel = self.param("kernel", linear_init, (7, 7, 1, width), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (width,), self.param_dtype)
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=width,
    )
    return y + spread(bias, y.shape, y.dtype)


class ConvNeXtBlock(nn.Module):
  """x + ls(mlp(norm(dwconv(x)))), for a tuple of maps that share the parameters."""

  layer_scale: float
  norm_eps: float
  dtype: Any
  param_dtype: Any

  def setup(self) -> None:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.dwconv = DepthwiseConv(**types)
    self.norm = make_norm("layernorm", eps=self.norm_eps, **types)
    self.ls = LayerScale(self.layer_scale, param_dtype=self.param_dtype)

  @nn.compact
  def __call__(
    self, xs: tuple[Float[Array, "B H W D"], ...], kept: tuple[Int[Array, "2 groups m"] | None, ...]
  ) -> tuple[tuple[Array, ...], None]:
    mlp = GeluMlp(4 * xs[0].shape[-1], dtype=self.dtype, param_dtype=self.param_dtype, name="mlp")

    def branch(ys: tuple[Float[Array, "b N D"], ...]) -> tuple[Float[Array, "b N D"], ...]:
      maps = (y.reshape(-1, *x.shape[1:]) for x, y in zip(xs, ys, strict=True))
      mixed = (self.dwconv(m).reshape(y.shape) for m, y in zip(maps, ys, strict=True))
      return tuple(self.ls(y) for y in mlp(tuple(self.norm(y) for y in mixed)))

    tokens = tuple(x.reshape(x.shape[0], -1, x.shape[-1]) for x in block_inputs(xs))
    tokens = add_branch(tokens, branch, tuple(None if rows is None else rows[0] for rows in kept))
    return tuple(y.reshape(x.shape) for x, y in zip(xs, tokens, strict=True)), None


class Stage(nn.Module):
  """The blocks of one resolution, their parameters stacked under the name `layers`."""

  depth: int
  layer_scale: float
  norm_eps: float
  remat: str
  unroll: int
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, xs: tuple[Array, ...], kept: tuple[Array | None, ...]) -> tuple[Array, ...]:
    scanned = nn.scan(
      recomputed(ConvNeXtBlock, self.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
      unroll=min(self.unroll, self.depth),
    )
    layers = scanned(self.layer_scale, self.norm_eps, self.dtype, self.param_dtype, name="layers")
    return layers(xs, kept)[0]


class ConvNeXt(Backbone):
  """A ConvNeXt whose last feature map is its patch tokens and whose pooled last map is its class feature.

  Parameters of a stage's blocks are stacked along a leading layer axis under `stage{0..3}/layers/`. Random choices come
  from the rng stream "drop_path", and only when `train=True`.

  Attributes:
    in_channels: C, channels of the images.
    depths: blocks of the four stages.
    widths: their channels.
    patch_size: `intermediate` resizes its maps to (H / patch_size, W / patch_size); None: they keep their own sizes.
    layer_scale: initial factor of the residual branches.
    norm_eps: epsilon of all norms.
    drop_path: share of the samples of a loss group that skip a residual branch in training.
    dtype: compute type of matrix products and maps; norms are float32 at least.
    param_dtype: type of the parameters.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "blocks" (everything),
      "offload" (everything; the inputs of the blocks wait in the host's memory); "attention", of which there is none,
      is as "none".
    unroll: blocks per iteration of a stage's scan.
  """

  in_channels: int = 3
  depths: tuple[int, ...] = (3, 3, 9, 3)
  widths: tuple[int, ...] = (96, 192, 384, 768)
  patch_size: int | None = None
  layer_scale: float = 1e-6
  norm_eps: float = 1e-6
  drop_path: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str = "none"
  unroll: int = 1

  @property
  def width(self) -> int:
    """D, channels of the features."""
    return self.widths[-1]

  @property
  def depth(self) -> int:
    """How many layers `intermediate` knows."""
    return len(self.depths)

  @property
  def num_registers(self) -> int:
    """None: the patch tokens are a map."""
    return 0

  @property
  def stride(self) -> int:
    """Pixels between neighbouring patch tokens."""
    return 4 * 2 ** (len(self.depths) - 1)

  def check(self) -> None:
    """Raises a ValueError, opening with `attribute=value`, if the attributes do not fit together."""
    check_remat(self.remat)
    if len(self.depths) != len(self.widths):
      raise ValueError(f"depths={self.depths}: must have as many stages as widths={self.widths}.")

  def setup(self) -> None:
    self.check()
    types = {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}
    self.downsamples = [
      Downsample(2 if i else 4, width, not i, self.norm_eps, name=f"downsample{i}", **types)
      for i, width in enumerate(self.widths)
    ]
    self.stages = [
      Stage(depth, self.layer_scale, self.norm_eps, self.remat, self.unroll, name=f"stage{i}", **types)
      for i, depth in enumerate(self.depths)
    ]
    self.final_norm = make_norm("layernorm", eps=self.norm_eps, **types)

  def _forward(
    self, images: Sequence[Array], masks: Sequence[Array | None], draws: Sequence[Draws], train: bool
  ) -> list[Features]:
    *_, last = self._maps(images, draws)
    return [self._features(x, self.final_norm) for x in last]

  def intermediate(self, images: Array, *, layers: Sequence[int], norm: bool = True) -> tuple[Features, ...]:
    """Features after the stages with these 0-based indices, in ascending order; widths differ.

    Args:
      images: [B, H, W, C], normalised.
      layers: stage indices; negative ones count from the end.
      norm: apply the final norm to the last stage; the others have none.

    Raises:
      ValueError: if there is no such stage.
    """
    check_images(images, self.in_channels, self.whole)
    wanted = self._wanted(layers)
    maps = self._maps([images], [Draws()])
    size = None
    if self.patch_size is not None:
      size = images.shape[1] // self.patch_size, images.shape[2] // self.patch_size
    last = self.depth - 1
    return tuple(self._features(maps[i][0], self.final_norm if norm and i == last else None, size) for i in wanted)

  def _maps(self, images: Sequence[Array], draws: Sequence[Draws]) -> list[tuple[Array, ...]]:
    """The feature maps of every stage, each for every list entry."""
    for batch in images:
      if min(batch.shape[1:3]) < self.stride:
        raise ValueError(
          f"images of {batch.shape[1]}x{batch.shape[2]} pixels are smaller than the stride of {self.stride}."
        )
    xs, maps, first = tuple(images), [], 0
    for downsample, stage, depth in zip(self.downsamples, self.stages, self.depths, strict=True):
      kept = tuple(None if draw.kept is None else draw.kept[first : first + depth] for draw in draws)
      xs = stage(tuple(nn.with_logical_constraint(downsample(x), ("batch", None, None, "width")) for x in xs), kept)
      maps.append(xs)
      first += depth
    return maps

  def _draw(self, entry: int, rows: int, groups: int) -> Draws:
    if self.drop_path <= 0:
      return Draws()
    key = jax.random.fold_in(self.make_rng("drop_path"), entry)
    return Draws(draw_kept(key, depth=sum(self.depths), groups=groups, rows=rows // groups, rate=self.drop_path))

  def _features(
    self, x: Float[Array, "B h w D"], norm: nn.Module | None, size: tuple[int, int] | None = None
  ) -> Features:
    pooled = jnp.mean(upcast(x), axis=(1, 2)).astype(x.dtype)  # [B, D]
    if size is not None:
      x = resize_map(x, size, method="bilinear", antialias=True).astype(x.dtype)
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, N, D]
    if norm is not None:
      pooled, patches = norm(pooled), norm(tokens)
    else:
      patches = tokens
    return Features(cls=pooled, registers=patches[:, :0], patches=patches, prenorm=tokens)
