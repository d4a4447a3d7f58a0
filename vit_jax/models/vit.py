"""The Vision Transformer: stacked blocks, several resolutions in one pass; DINOv3, and by attributes DINOv2 and ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vit_jax.models.backbone import Backbone
from vit_jax.models.blocks import Block, BlockInputs, draw_kept
from vit_jax.models.features import Draws, Features
from vit_jax.models.inputs import check_images
from vit_jax.models.layers import INIT_STD, make_norm, spread
from vit_jax.models.patches import PatchEmbed
from vit_jax.models.pooling import POOLS, AttentionPool, average
from vit_jax.models.position_table import PositionTable, place, sincos_positions
from vit_jax.models.positions import Rope, draw_rope, rope_tables
from vit_jax.models.remat import check_remat, recomputed
from vit_jax.ops.quantized import QUANTIZATIONS


class VisionTransformer(Backbone):
  """A ViT; by default with class token, mask token and rotary positions, as DINOv3's.

  Parameters of the `depth` blocks are stacked along a leading layer axis under `blocks/` and run by a scan, whatever
  `unroll` is. Random choices come from the rng streams "drop_path" and "rope", and only when `train=True`.

  Attributes:
    in_channels: C, channels of the images.
    patch_size: side of a patch in pixels.
    width: D, channels of a token.
    depth: L, number of blocks.
    num_heads: attention heads; each is width / num_heads wide.
    mlp: "gelu", "gelu_tanh" (its approximation) or "swiglu".
    mlp_hidden: F, hidden channels of the feed-forward branch; None: 4 x width.
    class_token: whether there is a class token.
    masking: whether there is a mask token; without it there can be no masks.
    num_registers: R, learned tokens without a meaning of their own.
    layer_scale: initial factor of the residual branches; None: no layer scale.
    qkv_bias, proj_bias, mlp_bias: whether these maps have a bias.
    mask_k_bias: the key bias has no effect (published models).
    patch_bias: whether the patch embedding has a bias.
    qk_norm: normalise queries and keys per head.
    pre_norm: a norm before the first block.
    norm: "layernorm" or "rmsnorm"; norm_eps: its epsilon.
    separate_cls_norm: a final norm of their own for class token and registers.
    separate_local_cls_norm: one more for class token and registers of the local crops (list entry 1) in training.
    rope: rotary positions; None: none.
    position_table: absolute positions, added to the tokens; None: none.
    pool: what `Features.cls` is: "cls" the class token, "avg" the mean of the patches, "map" attention pooling,
      "distilled" the mean of the class token and the first register, which is DeiT's distillation token.
    pool_norm: the final norm is that of the pooled feature alone; tokens stay as the last block leaves them.
    init_std: standard deviation of the blocks' initial weights. A narrow model learns faster from width ** -0.5,
      which keeps the size of what passes through; the published 0.02 is that for width 2500.
    drop_path: share of the samples of a loss group that skip a residual branch in training.
    dtype: compute type of matrix products and tokens; norms and softmax are float32 at least.
    param_dtype: type of the parameters.
    quantization: 8 bits in which the linear maps of the blocks are computed, "fp8" or "int8" (`ops/quantized.py`);
      None: `dtype`.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "attention" (its weights),
      "blocks" (everything), "offload" (everything; the inputs of the blocks wait in the host's memory).
    unroll: blocks per iteration of the scan.
  """

  in_channels: int = 3
  patch_size: int = 16
  width: int = 384
  depth: int = 12
  num_heads: int = 6
  mlp: str = "gelu"
  mlp_hidden: int | None = None
  class_token: bool = True
  masking: bool = True
  num_registers: int = 0
  layer_scale: float | None = None
  qkv_bias: bool = True
  proj_bias: bool = True
  mlp_bias: bool = True
  mask_k_bias: bool = False
  patch_bias: bool = True
  qk_norm: bool = False
  pre_norm: bool = False
  norm: str = "layernorm"
  norm_eps: float = 1e-6
  separate_cls_norm: bool = False
  separate_local_cls_norm: bool = False
  rope: Rope | None = Rope()
  position_table: PositionTable | None = None
  pool: str = "cls"
  pool_norm: bool = False
  init_std: float = INIT_STD
  drop_path: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  quantization: str | None = None
  remat: str = "none"
  unroll: int = 1

  @property
  def stride(self) -> int:
    """Pixels between neighbouring patch tokens."""
    return self.patch_size

  @property
  def whole(self) -> int:
    return self.patch_size

  def setup(self) -> None:
    self.check()
    types = {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}
    token = nn.initializers.normal(0.02)
    if self.class_token:
      self.cls_token = self.param("cls_token", token, (self.width,), types["param_dtype"])
    if self.num_registers:
      self.registers = self.param("registers", token, (self.num_registers, self.width), types["param_dtype"])
    if self.masking:
      self.mask_token = self.param("mask_token", nn.initializers.zeros, (self.width,), types["param_dtype"])
    if self._has_learned_positions:
      table = self.position_table
      rows = table.prefix_length(self.class_token, self.num_registers) + table.grid[0] * table.grid[1]
      self.positions = self.param("positions", token, (rows, self.width), types["param_dtype"])
    self.patch_embed = PatchEmbed(self.patch_size, self.width, use_bias=self.patch_bias, **types)
    self.blocks = self._stacked_blocks(types)
    norm = {"eps": self.norm_eps, **types}
    if self.pre_norm:
      self.norm_pre = make_norm(self.norm, **norm)
    # `self.norm` is the attribute that names the kind, so the modules are named explicitly.
    self.final_norm = make_norm(self.norm, name="final_norm", **norm)
    if self.separate_cls_norm:
      self.cls_norm = make_norm(self.norm, **norm)
    if self.separate_local_cls_norm:
      self.local_cls_norm = make_norm(self.norm, **norm)
    if self.pool == "map":
      mlp = (self.mlp, self.mlp_hidden or 4 * self.width)
      self.attn_pool = AttentionPool(self.num_heads, *mlp, self.norm, self.norm_eps, **types)

  @property
  def _has_learned_positions(self) -> bool:
    return self.position_table is not None and self.position_table.kind == "learned"

  def check(self) -> None:
    """Raises a ValueError, opening with `attribute=value`, if the attributes do not fit together."""
    check_remat(self.remat)
    self._check_quantization()
    if self.width % self.num_heads:
      raise ValueError(f"num_heads={self.num_heads}: must divide width={self.width}.")
    if self.rope is not None and (self.width // self.num_heads) % 4:
      raise ValueError(
        f"num_heads={self.num_heads}: must divide width={self.width} into heads whose width is a multiple of 4, for "
        "rotary positions."
      )
    if self.pool not in POOLS:
      raise ValueError(f"pool={self.pool!r}: must be one of {', '.join(POOLS)}.")
    if self.pool in ("cls", "distilled") and not self.class_token:
      raise ValueError(f'pool={self.pool!r}: needs a class token: class_token=True, or else pool="avg" or "map".')
    if self.pool == "distilled" and not self.num_registers:
      raise ValueError("pool='distilled': needs a distillation token: num_registers=1.")
    if self.pool_norm and (self.separate_cls_norm or self.separate_local_cls_norm):
      raise ValueError("pool_norm=True: does not go with separate_cls_norm or separate_local_cls_norm.")

  def _check_quantization(self) -> None:
    if self.quantization is None:
      return
    if self.quantization not in QUANTIZATIONS:
      raise ValueError(f"quantization={self.quantization!r}: must be one of {', '.join(QUANTIZATIONS)}, or None.")
    for name, size in (("width", self.width), ("mlp_hidden", self.mlp_hidden or 4 * self.width)):
      if size % 16:
        raise ValueError(f"quantization={self.quantization!r}: needs a multiple of 16 as {name}, which is {size}.")

  def _stacked_blocks(self, types: dict[str, Any]) -> nn.Module:
    scanned = nn.scan(
      recomputed(_ScanStep, self.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=self.depth,
      unroll=min(self.unroll, self.depth),
      check_constancy_invariants=False,  # nothing leaves the scan but its carry: one trace of a block less
    )
    return scanned(
      num_heads=self.num_heads,
      mlp_kind=self.mlp,
      mlp_hidden=self.mlp_hidden or 4 * self.width,
      layer_scale=self.layer_scale,
      qkv_bias=self.qkv_bias,
      proj_bias=self.proj_bias,
      mlp_bias=self.mlp_bias,
      mask_k_bias=self.mask_k_bias,
      qk_norm=self.qk_norm,
      norm_kind=self.norm,
      norm_eps=self.norm_eps,
      init_std=self.init_std,
      recompute_attention=self.remat == "attention",
      quantization=self.quantization,
      **types,
    )

  def _forward(
    self, images: Sequence[Array], masks: Sequence[Array | None], draws: Sequence[Draws], train: bool
  ) -> list[Features]:
    grids = [self._grid(batch) for batch in images]
    xs = tuple(self._tokens(batch, mask) for batch, mask in zip(images, masks, strict=True))
    (xs, _), _ = self.blocks((xs, None), *self._block_inputs(grids, draws))
    return [self._features(x, local=train and i == 1) for i, x in enumerate(xs)]

  def intermediate(self, images: Array, *, layers: Sequence[int], norm: bool = True) -> tuple[Features, ...]:
    """Features after the blocks with these 0-based indices, in ascending order of the blocks.

    Args:
      images: [B, H, W, C], normalised.
      layers: block indices; negative ones count from the end.
      norm: apply the model's final norm(s) to every layer.

    Raises:
      ValueError: if there is no such block.
    """
    check_images(images, self.in_channels, self.whole)
    wanted = self._wanted(layers)
    x = self._tokens(images, None)
    inputs, shared = self._block_inputs([self._grid(images)], [Draws()])
    # Every block writes its output somewhere: the wanted ones into a slot of their own, the others into the last.
    slots = jnp.array([wanted.index(i) if i in wanted else len(wanted) for i in range(self.depth)])
    buffer = jnp.zeros((len(wanted) + 1, *x.shape), x.dtype)  # [layers + 1, B, T, D]
    (_, buffer), _ = self.blocks(((x,), buffer), (inputs[0], slots), shared)
    return tuple(self._features(buffer[i], normalized=norm) for i in range(len(wanted)))

  def _grid(self, images: Array) -> tuple[int, int]:
    return images.shape[1] // self.patch_size, images.shape[2] // self.patch_size

  @property
  def _prefix(self) -> int:
    """Tokens before the patches."""
    return int(self.class_token) + self.num_registers

  def _tokens(self, images: Array, mask: Bool[Array, "B N"] | None) -> Float[Array, "B T D"]:
    patches = self.patch_embed(images)  # [B, N, D]
    if mask is not None:
      if not self.masking:
        raise ValueError("masks were given to a model without a mask token: set masking=True.")
      patches = jnp.where(mask[..., None], spread(self.mask_token, patches.shape, patches.dtype), patches)
    batch, parts = images.shape[0], []
    if self.class_token:
      parts.append(spread(self.cls_token, (batch, 1, self.width), patches.dtype))
    if self.num_registers:
      parts.append(spread(self.registers, (batch, *self.registers.shape), patches.dtype))
    tokens = jnp.concatenate([*parts, patches], axis=1)  # [B, T, D]
    if self.position_table is not None:
      tokens = tokens + spread(self._absolute_positions(self._grid(images)), tokens.shape, tokens.dtype)
    if self.pre_norm:
      tokens = self.norm_pre(tokens)
    return nn.with_logical_constraint(tokens, ("batch", None, "width"))

  def _absolute_positions(self, grid: tuple[int, int]) -> Float[Array, "T D"]:
    if not self._has_learned_positions:
      patches = jnp.asarray(sincos_positions(grid, self.width), jnp.promote_types(self.param_dtype, jnp.float32))
      return place(patches[:0], patches, self._prefix)
    front = self.position_table.prefix_length(self.class_token, self.num_registers)
    patches = self.position_table.resize(self.positions[front:], grid)  # [N, D]
    return place(self.positions[:front], patches, self._prefix)

  def _draw(self, entry: int, rows: int, groups: int) -> Draws:
    kept = rope = None
    if self.drop_path > 0:
      key = jax.random.fold_in(self.make_rng("drop_path"), entry)
      kept = draw_kept(key, depth=self.depth, groups=groups, rows=rows // groups, rate=self.drop_path)
    if self.rope is not None and self.rope.augmented:
      rope = draw_rope(jax.random.fold_in(self.make_rng("rope"), entry), self.rope, self.depth, groups)
    return Draws(kept=kept, rope=rope)

  def _block_inputs(self, grids: list[tuple[int, int]], draws: Sequence[Draws]) -> tuple[Any, Any]:
    """What is scanned over the blocks, and what all blocks share, per list entry."""
    head_dim, scanned, shared = self.width // self.num_heads, [], []
    for grid, draw in zip(grids, draws, strict=True):
      tables = None if self.rope is None else rope_tables(self.rope, grid, head_dim, draw.rope)
      varied = draw.rope is not None
      scanned.append(BlockInputs(tables=tables if varied else None, kept=draw.kept))
      shared.append(None if varied else tables)
    return (tuple(scanned), None), tuple(shared)

  def _features(self, x: Float[Array, "B T D"], *, local: bool = False, normalized: bool = True) -> Features:
    first, prefix, y = int(self.class_token), self._prefix, x
    if normalized and not self.pool_norm:
      cls_norm = self.cls_norm if self.separate_cls_norm else self.final_norm
      if self.separate_local_cls_norm and (local or self.is_initializing()):
        local_cls = self.local_cls_norm(x[:, :prefix])
      front = local_cls if self.separate_local_cls_norm and local else cls_norm(x[:, :prefix])
      y = jnp.concatenate([front, self.final_norm(x[:, prefix:])], axis=1)
    pooled = self._pool(y)
    if normalized and self.pool_norm:
      pooled = self.final_norm(pooled)
    return Features(cls=pooled, registers=y[:, first:prefix], patches=y[:, prefix:], prenorm=x)

  def _pool(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    if self.pool == "map":
      return self.attn_pool(tokens)
    if self.pool == "distilled":
      return average(tokens[:, :2])
    return tokens[:, 0] if self.pool == "cls" else average(tokens[:, self._prefix :])


class _ScanStep(Block):
  """A block in the form a scan wants: carries the tokens, and the buffer of intermediate outputs when there is one."""

  def __call__(self, carry: tuple[Any, Array | None], scanned: Any, shared: Any) -> tuple[Any, None]:
    xs, buffer = carry
    inputs, slot = scanned
    merged = tuple(
      entry.replace(tables=common) if entry.tables is None else entry
      for entry, common in zip(inputs, shared, strict=True)
    )
    xs = super().__call__(xs, merged)
    if buffer is not None:
      buffer = jax.lax.dynamic_update_index_in_dim(buffer, xs[0], slot, axis=0)
    return (xs, buffer), None
