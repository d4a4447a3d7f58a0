"""Which model a state dict of the DINO repositories or of timm holds, read off its tensor names and shapes."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from vit_jax.models import ConvNeXt, ProjectionHead, Rope, VisionTransformer
from vit_jax.weights import dinov2, timm
from vit_jax.weights.errors import WeightsError
from vit_jax.weights.grids import Given, ImageSize, find_table

# What shapes cannot tell: the values of all published models.
ASSUMED = {"norm_eps": 1e-5, "rope.normalize": "separate", "rope.rescale": 2.0}


# Attention heads by width, where heads are not 64 wide.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


_BLOCK = re.compile(r"blocks\.\d+\.")
_STAGE = re.compile(r"stages\.(\d+)\.(\d+)\.")


class Recognised(NamedTuple):
  """What a state dict holds.

  Attributes:
    layout: its naming scheme.
    module: the class of the model.
    attributes: of the module.
    assumed: those that leave no trace in a file, by name.
  """

  layout: str
  module: type[nn.Module]
  attributes: dict[str, Any]
  assumed: dict[str, Any]


class _Shapes:
  """The shapes of a state dict, and what its blocks have in common, even if some of them are broken."""

  def __init__(self, state_dict: Mapping[str, Any]):
    self._shapes = {name: np.shape(value) for name, value in state_dict.items()}

  def __contains__(self, name: str) -> bool:
    return name in self._shapes

  def of(self, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor, which has so many axes.

    Raises:
      WeightsError: if it is missing or has not.
    """
    if name not in self._shapes:
      raise WeightsError(f"cannot tell which model this is: {name} is missing; there are {self._some()}.")
    if len(self._shapes[name]) != rank or 0 in self._shapes[name]:
      raise WeightsError(f"cannot tell which model this is: {name} is {self._shapes[name]}, expected {rank} axes.")
    return self._shapes[name]

  def block(self, kind: str, rank: int) -> tuple[int, ...]:
    """The shape that a tensor has in most blocks.

    Raises:
      WeightsError: if no block has it.
    """
    found = [shape for shape in self._of_blocks.get(kind, []) if len(shape) == rank and 0 not in shape]
    if not found:
      raise WeightsError(f"cannot tell which model this is: no block has {kind}; there are {self._some()}.")
    return collections.Counter(found).most_common(1)[0][0]

  def in_blocks(self, kind: str) -> bool:
    """Whether a block has this tensor."""
    return kind in self._of_blocks

  @functools.cached_property
  def depth(self) -> int:
    """How many blocks there are."""
    return 1 + max((int(name.split(".")[1]) for name in self._shapes if _BLOCK.match(name)), default=-1)

  @functools.cached_property
  def _of_blocks(self) -> dict[str, list[tuple[int, ...]]]:
    kinds: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in self._shapes.items():
      if _BLOCK.match(name):
        kinds.setdefault(name.split(".", 2)[2], []).append(shape)
    return kinds

  def _some(self) -> str:
    names = sorted(self._shapes)
    return ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "") if names else "none"


def recognise(state_dict: Mapping[str, Any], *, given: Given = None, said: ImageSize | None = None) -> Recognised:
  """The model of a state dict (arrays or lazy tensors) in a layout of the DINO repositories or of timm.

  Args:
    state_dict: names → tensors.
    given: what whoever opens it says of a table of positions, whose grid may leave no trace in a file.
    said: the image size in a configuration beside it.

  Raises:
    WeightsError: if it is of none of these, or the grid of its positions is not certain.
  """
  if any(name.startswith("downsample_layers.") for name in state_dict):
    return Recognised("dinov3", ConvNeXt, _convnext(state_dict), {})
  if "rope_embed.periods" in state_dict or "storage_tokens" in state_dict:
    return Recognised("dinov3", VisionTransformer, infer_attributes(state_dict), ASSUMED)
  shapes = _Shapes(state_dict)
  if "patch_embed.proj.weight" not in shapes and not shapes.depth:
    names = ", ".join(sorted(state_dict)[:5]) or "nothing"
    raise WeightsError(
      f"not a backbone of DINOv3, DINOv2 or timm: there is neither patch_embed.proj.weight nor a block; it has {names}."
    )
  if "pos_embed" in shapes and "mask_token" in shapes:
    attributes = _dinov2(shapes, dict(given=given, said=said))
    assumed = {name: attributes[name] for name in ("num_heads", "norm_eps", "position_table")}
    return Recognised("dinov2", VisionTransformer, attributes, assumed)
  attributes = _timm(shapes, dict(given=given, said=said))
  assumed = {name: attributes[name] for name in ("num_heads", "norm_eps", "mlp", "pool", "rope", "position_table")}
  if attributes["qk_norm"]:  # whose weights are as long as a head is wide
    del assumed["num_heads"]
  for name in ("rope", "position_table"):
    if attributes[name] is None:
      del assumed[name]
  return Recognised("timm", VisionTransformer, attributes, assumed)


def infer_attributes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `VisionTransformer` that a DINOv3 backbone's state dict was saved from.

  The norm epsilon and the way rotary coordinates are normalised leave no trace in a file: `ASSUMED`.

  Raises:
    WeightsError: if the names are not those of a DINOv3 ViT backbone.
  """
  shapes = _Shapes(state_dict)
  width = shapes.block("norm1.weight", 1)[0]
  shapes.of("rope_embed.periods", 1)
  period = np.asarray(state_dict["rope_embed.periods"], np.float64)
  gated = shapes.in_blocks("mlp.w1.weight")
  return _trunk(shapes) | dict(
    num_heads=width // (4 * period.size),
    mlp="swiglu" if gated else "gelu",
    mlp_hidden=shapes.block("mlp.w1.weight" if gated else "mlp.fc1.weight", 2)[0],
    num_registers=shapes.of("storage_tokens", 3)[1] if "storage_tokens" in shapes else 0,
    layer_scale=1e-5 if shapes.in_blocks("ls1.gamma") else None,
    qkv_bias=shapes.in_blocks("attn.qkv.bias"),
    mlp_bias=shapes.in_blocks(f"mlp.{'w1' if gated else 'fc1'}.bias"),
    mask_k_bias=shapes.in_blocks("attn.qkv.bias_mask"),
    norm="layernorm" if shapes.in_blocks("norm1.bias") else "rmsnorm",
    norm_eps=ASSUMED["norm_eps"],
    separate_cls_norm="cls_norm.weight" in shapes,
    separate_local_cls_norm="local_cls_norm.weight" in shapes,
    rope=_rope(period),
  )


def _rope(period: np.ndarray) -> Rope:
  """The settings whose periods these are (rounded to bfloat16 or not)."""
  n = period.size
  kept = dict(normalize=ASSUMED["rope.normalize"], rescale=ASSUMED["rope.rescale"])
  if math.isclose(period[0], 1.0, rel_tol=1e-3):
    base = 100.0 if n == 1 else float(period[-1] ** (n / (n - 1)))  # the last period is base^((n - 1) / n)
    rounded = float(f"{base:.2g}")  # a base is a round number; bfloat16 keeps less than three digits
    return Rope(base=rounded if math.isclose(base, rounded, rel_tol=1e-2) else base, **kept)
  return Rope(base=None, min_period=float(period[0]), max_period=float(period[-1]), **kept)


def _convnext(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  shapes, blocks = _Shapes(state_dict), collections.defaultdict(set)
  for name in state_dict:
    if match := _STAGE.match(name):
      blocks[int(match[1])].add(int(match[2]))
  if max(blocks, default=0) >= len(state_dict):
    raise WeightsError(f"cannot tell which model this is: there is a stage {max(blocks)} of {len(state_dict)} tensors.")
  stages = range(max(blocks, default=-1) + 1)
  return dict(
    in_channels=shapes.of("downsample_layers.0.0.weight", 4)[1],
    depths=tuple(1 + max(blocks[i], default=-1) for i in stages),
    widths=tuple(shapes.of(f"downsample_layers.{i}.{1 if i else 0}.weight", 4)[0] for i in stages),
  )


def _trunk(shapes: _Shapes) -> dict[str, Any]:
  """What the names that the DINO repositories and timm share say."""
  width = shapes.block("norm1.weight", 1)[0]
  _, in_channels, patch_size, _ = shapes.of("patch_embed.proj.weight", 4)
  return dict(
    in_channels=in_channels,
    patch_size=patch_size,
    width=width,
    depth=shapes.depth,
    num_heads=HEADS.get(width, max(width // 64, 1)),
    proj_bias=shapes.in_blocks("attn.proj.bias"),
  )


def _dinov2(shapes: _Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
  gated = shapes.in_blocks("mlp.w12.weight")
  registers = shapes.of("register_tokens", 3)[1] if "register_tokens" in shapes else 0
  trunk = _trunk(shapes)
  rows, how = shapes.of("pos_embed", 3)[1], dinov2.resizing(registers)
  table = find_table(rows, {"cls": 1}, trunk["patch_size"], **known, **how)
  return trunk | dict(
    mlp="swiglu" if gated else "gelu",
    mlp_hidden=shapes.block("mlp.w12.weight", 2)[0] // 2 if gated else shapes.block("mlp.fc1.weight", 2)[0],
    num_registers=registers,
    layer_scale=1e-5 if shapes.in_blocks("ls1.gamma") else None,
    qkv_bias=shapes.in_blocks("attn.qkv.bias"),
    mlp_bias=shapes.in_blocks("mlp.w12.bias") or shapes.in_blocks("mlp.fc1.bias"),
    norm_eps=1e-6,
    rope=None,
    position_table=table,
  )


def _timm(shapes: _Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
  rotary, has_class, distilled = "pos_embed" not in shapes, "cls_token" in shapes, "dist_token" in shapes
  trunk = _trunk(shapes)
  foreign = ("attn.qkv.bias", "ls1.gamma") if rotary else ("attn.q_bias", "gamma_1", "attn.k_proj.weight")
  if others := [name for name in foreign if shapes.in_blocks(name)]:
    raise WeightsError(
      f"a model of timm that is not read: its blocks have {others[0]}, but {'no' if rotary else 'a'} pos_embed. Those "
      "that are: ViTs with pos_embed, and DINOv3's, with rotary positions."
    )
  registers = shapes.of("reg_token", 3)[1] if "reg_token" in shapes else int(distilled)
  hidden = shapes.block("mlp.fc2.weight", 2)[1]
  gated = shapes.in_blocks("mlp.fc1_g.weight") or shapes.block("mlp.fc1.weight", 2)[0] == 2 * hidden
  if shapes.in_blocks("attn.q_norm.weight"):
    trunk["num_heads"] = trunk["width"] // shapes.block("attn.q_norm.weight", 1)[0]
  table = None
  if not rotary:
    before = int(has_class) + registers
    # A class token alone has a position, or (no_embed_class) none; so have registers, together with it.
    readings = ({("cls" if has_class and not registers else "all"): before} if before else {}) | {"none": 0}
    rows = shapes.of("pos_embed", 3)[1]
    table = find_table(rows, readings, trunk["patch_size"], **known, **timm.RESIZING)
  pool = "map" if "attn_pool.latent" in shapes else "avg" if "fc_norm.weight" in shapes or not has_class else "cls"
  return trunk | dict(
    mlp="swiglu" if gated else "gelu",
    mlp_hidden=hidden,
    class_token=has_class,
    masking=False,
    num_registers=registers,
    layer_scale=1e-5 if shapes.in_blocks("ls1.gamma") or shapes.in_blocks("gamma_1") else None,
    qkv_bias=shapes.in_blocks("attn.qkv.bias") or shapes.in_blocks("attn.q_bias"),
    mask_k_bias=shapes.in_blocks("attn.q_bias"),
    mlp_bias=shapes.in_blocks("mlp.fc2.bias"),
    patch_bias="patch_embed.proj.bias" in shapes,
    qk_norm=shapes.in_blocks("attn.q_norm.weight"),
    pre_norm="norm_pre.weight" in shapes,
    norm_eps=1e-5 if rotary else 1e-6,
    rope=Rope(rescale=ASSUMED["rope.rescale"]) if rotary else None,
    position_table=table,
    pool="distilled" if distilled else pool,
    pool_norm="fc_norm.weight" in shapes,
  )


def infer_head(state_dict: Mapping[str, Any]) -> ProjectionHead:
  """The head that a state dict of the DINOv3 repository's names was saved from.

  Raises:
    WeightsError: if the names are not those of a head.
  """
  if "last_layer.weight" not in state_dict:
    begin = ", ".join(sorted(state_dict)[:5])
    raise WeightsError(
      f"not the state dict of a DINOv3 projection head: it lacks last_layer.weight; it has {begin}, … (heads of DINO "
      "and DINOv2, whose last layer is weight-normalised, are other heads)."
    )
  kernels = [name for name in state_dict if name.startswith("mlp.") and name.endswith("weight")]
  prototypes, bottleneck = np.shape(state_dict["last_layer.weight"])
  first = "mlp.weight" if kernels == ["mlp.weight"] else "mlp.0.weight"
  return ProjectionHead(
    hidden=np.shape(state_dict[first])[0] if first in state_dict else bottleneck,
    bottleneck=bottleneck,
    prototypes=prototypes,
    num_layers=len(kernels),
    mlp_bias=any(name.startswith("mlp.") and name.endswith("bias") for name in state_dict),
  )
