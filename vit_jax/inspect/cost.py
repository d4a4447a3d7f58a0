"""What a model costs: parameters, tokens, floating-point operations, without making a single parameter.

XLA's own count is of no use for this: it counts the body of a scan once, whatever the depth. So the operations are
written out here, as matrix products only (a product of [a, b] and [b, c] is 2abc); norms, softmax, activations and
rotary positions, a few per cent for small models and less for large ones, are left out, as is the custom for MFU.

Forward pass of one image, N patches of p x p x C pixels, T = 1 + R + N tokens, width D, feed-forward F, depth L:

    patch embedding   2 N p^2 C D
    q, k, v           2 T D 3D          per block
    scores            2 T^2 D           per block  (all heads together)
    values            2 T^2 D           per block
    projection        2 T D^2           per block
    feed-forward      4 T D F           per block  (6 T D F for SwiGLU)

ConvNeXt, at a stage of width D with L blocks on h x w positions (reference section 1.9):

    downsampling          2 h w k^2 C D      C channels before it, k = 4 in the stem, else 2
    depthwise convolution 2 h w 49 D         per block
    feed-forward          2 h w D 4D * 2     per block

Head, per row: 2 (D hidden + (n - 2) hidden^2 + hidden bottleneck + bottleneck K) for n layers up to the bottleneck.

DINO step, per image with G global and l local crops and M masked patches; a backward pass costs two forward passes:

    student backbone   3 (G forward(global) + l forward(local))
    teacher backbone   G forward(global)
    gram teacher       G forward(gram), of the gram crops or, without such, of the global ones; none where the teacher
                       itself anchors
    DINO head          3 (G + l) rows of the student, G rows of the teacher
    iBOT head          3 M rows of the student, M rows of the teacher

Recomputation (model.remat) is not counted: it is no useful work. Nor are the rows that model.drop_path skips.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import ConvNeXt, ProjectionHead, VisionTransformer

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Cost:
  """The cost of one model at one image size.

  Attributes:
    parameters: number of parameters.
    grid: patches, (rows, columns).
    tokens: what the model returns per image: class feature, registers and patches.
    flops: operations of the forward pass of one image.
    parts: the same by part of the model.
  """

  parameters: int
  grid: tuple[int, int]
  tokens: int
  flops: int
  parts: dict[str, int]


@dataclass(frozen=True)
class StepCost:
  """Operations of one training step per image, by part; `flops` is their sum (times images/s: FLOP/s for an MFU)."""

  parts: dict[str, float]

  @property
  def flops(self) -> float:
    return sum(self.parts.values())


def count(model: VisionTransformer | ConvNeXt, image_size: Size) -> Cost:
  """The cost of a backbone for images of this size (side, or height and width, in pixels).

  Raises:
    ValueError: if the image is smaller than a patch.
  """
  height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
  grid = (height // model.stride, width // model.stride)
  if not grid[0] * grid[1]:
    raise ValueError(f"images of {height}x{width} pixels are smaller than one patch of {model.stride}.")
  patches = grid[0] * grid[1]
  tokens = 1 + model.num_registers + patches
  parts = _convnext_parts if isinstance(model, ConvNeXt) else _vit_parts
  operations = parts(model, patches, model.in_channels)
  return Cost(parameter_count(abstract_params(model)), grid, tokens, sum(operations.values()), operations)


def _vit_parts(model: VisionTransformer, patches: int, channels: int) -> dict[str, int]:
  tokens, dim = int(model.class_token) + model.num_registers + patches, model.width
  hidden = model.mlp_hidden or 4 * dim
  matrices = 3 if model.mlp == "swiglu" else 2
  return {
    "patch embedding": 2 * patches * model.patch_size**2 * channels * dim,
    "q, k, v": model.depth * 2 * tokens * dim * 3 * dim,
    "attention": model.depth * 4 * tokens**2 * dim,
    "projection": model.depth * 2 * tokens * dim**2,
    "feed-forward": model.depth * 2 * matrices * tokens * dim * hidden,
  }


def _convnext_parts(model: ConvNeXt, patches: int, channels: int) -> dict[str, int]:
  parts = {"patch embedding": 0, "depthwise convolution": 0, "feed-forward": 0}
  before = channels
  for i, (depth, dim) in enumerate(zip(model.depths, model.widths, strict=True)):
    positions = patches * 4 ** (len(model.depths) - 1 - i)
    parts["patch embedding"] += 2 * positions * (4 if i else 16) * before * dim
    parts["depthwise convolution"] += depth * 2 * positions * 49 * dim
    parts["feed-forward"] += depth * 2 * positions * 2 * dim * 4 * dim
    before = dim
  return parts


def head_flops(head: ProjectionHead, width: int) -> int:
  """Operations of a projection head for one row of `width` channels."""
  sizes = [width] + [head.hidden] * (head.num_layers - 1) + [head.bottleneck, head.prototypes]
  return sum(2 * a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))


def dino_step(
  model: VisionTransformer,
  dino_head: ProjectionHead,
  ibot_head: ProjectionHead,
  *,
  global_size: Size,
  local_size: Size,
  local_number: int,
  masked: float,
  gram_size: Size | None = None,
  gram_teacher: bool | None = None,
  own_teacher: bool = True,
  global_number: int = 2,
) -> StepCost:
  """The cost of a training step per image.

  Args:
    masked: masked patches per image, both global crops together.
    gram_size: of the gram crops; None: there are none.
    gram_teacher: whether a gram teacher has a pass of its own; None: if there are gram crops.
    own_teacher: whether the teacher is the model's own average; False: its targets come from elsewhere.
  """
  whole, part = count(model, global_size), count(model, local_size)
  dino, ibot = head_flops(dino_head, model.width), head_flops(ibot_head, model.width)
  anchored = gram_size is not None if gram_teacher is None else gram_teacher
  gram = {"gram teacher": global_number * count(model, gram_size or global_size).flops} if anchored else {}
  teachers = global_number if own_teacher else 0
  return StepCost(
    {
      "student, global crops": 3 * global_number * _with_drop_path(whole, model.drop_path),
      "student, local crops": 3 * local_number * _with_drop_path(part, model.drop_path),
      "teacher": teachers * whole.flops,
      **gram,
      "DINO head": (3 * (global_number + local_number) + teachers) * dino,
      "iBOT head": (4 if own_teacher else 3) * masked * ibot,
    }
  )


def executed(jaxpr: Any) -> int:
  """Operations of all matrix products and convolutions of a jaxpr, whatever is recomputed counted again.

  A scan counts as often as it runs, a Pallas kernel as often as its grid has points, what every device does for itself
  (shard_map) as often as there are devices, of a conditional the dearest branch.
  """
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), (batch, _) = params["dimension_numbers"]
      left, right = (v.aval.shape for v in equation.invars)
      total += 2 * math.prod(left) * math.prod(right) // math.prod(left[i] for i in (*contracted, *batch))
    elif name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      features = kernel[params["dimension_numbers"].rhs_spec[0]]
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
    elif name == "cond":
      total += max(executed(branch.jaxpr) for branch in params["branches"])
    else:
      times = 1
      if name == "scan":
        times = params["length"]
      elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
      elif name == "shard_map":
        times = params["mesh"].size
      total += times * sum(executed(inner) for inner in _inside(params))
  return total


def _inside(params: dict[str, Any]) -> Iterator[Any]:
  """The jaxprs among the parameters of an equation."""
  for value in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
    value = getattr(value, "jaxpr", value)
    if hasattr(value, "eqns"):
      yield value


def _with_drop_path(cost: Cost, rate: float) -> float:
  embedding = cost.parts["patch embedding"]  # nothing of it is skipped
  return embedding + (1 - rate) * (cost.flops - embedding)


def abstract_params(module: nn.Module, *, width: int = 0) -> Any:
  """Shapes and types of all parameters, as a tree; nothing is computed. `width` is the input width of a head."""
  if isinstance(module, ProjectionHead):
    inputs = jax.ShapeDtypeStruct((1, width), jnp.float32)
  else:
    inputs = jax.ShapeDtypeStruct((1, module.stride, module.stride, module.in_channels), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]


def parameter_count(params: Any) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
