"""Gram anchoring: the student's patches keep the similarities that they have for an earlier teacher.

DINOv3 (Siméoni et al. 2025), section 4: in long runs the patch features degrade while the class token improves; a gram
teacher, a backbone from before, anchors the Gram matrices of the patches. In the order of a step: `load` the teacher at
its step, `features` of the gram teacher, the `terms` of the loss, `refresh`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vit_jax import losses
from vit_jax.methods.settings import num_steps
from vit_jax.methods.state import State
from vit_jax.ops.resize import resize_map

Batch = dict[str, jax.Array]
SHARED = ("ema", "teacher")  # values of gram.source


def enabled(config: Any) -> bool:
  """Whether the run anchors Gram matrices, at least from some step on."""
  return config.gram.source is not None or config.gram.load_at is not None


def has_own_teacher(config: Any) -> bool:
  """Whether the state holds a gram teacher: otherwise there is no anchoring, or another teacher serves."""
  return enabled(config) and not is_shared(config)


def is_shared(config: Any) -> bool:
  """Whether the EMA teacher, or in a distillation the frozen one, is also the gram teacher."""
  return config.gram.source in SHARED


def has_own_pass(config: Any, *, distilling: bool) -> bool:
  """Whether features are computed for the anchor alone: not where the teacher of the targets has them already."""
  return has_own_teacher(config) or (distilling and config.gram.source == "ema")


def describe(config: Any) -> str | None:
  """Where the gram teacher comes from, for people; None: there is no Gram anchoring."""
  if not enabled(config):
    return None
  words = {
    None: "none",
    "ema": "the EMA teacher itself",
    "teacher": "the frozen teacher itself",
    "init": "the backbone that the run starts from",
  }
  text, refresh = words.get(config.gram.source, config.gram.source), config.gram.refresh
  if config.gram.load_at is not None:
    text += f", then the EMA teacher after {config.gram.load_at}"
  if refresh.every is not None:
    text += f"; refreshed with the EMA teacher every {refresh.every}"
    text += f" from {refresh.first}" if refresh.first is not None else ""
    text += f", {refresh.max} times at most" if refresh.max is not None else ""
  return text


def init(config: Any, backbone: Any) -> tuple[Any, dict[str, jax.Array]]:
  """The gram teacher of a fresh state, a copy of the teacher's backbone (or None), and its counters.

  The counters are "gram_loaded", copies made by `gram.load_at` (0 or 1), and "gram_refreshes".
  """
  if not has_own_teacher(config):
    return None, {}
  zero = jnp.zeros((), jnp.int32)
  return jax.tree.map(jnp.copy, backbone), {"gram_loaded": zero, "gram_refreshes": zero}


def loaded(config: Any, state: State) -> Bool[Array, ""]:
  """Whether there is a gram teacher yet: without a source there is none before `gram.load_at`."""
  if config.gram.source is not None:
    return jnp.ones((), bool)
  return state.counters["gram_loaded"] > 0


def load(config: Any, state: State) -> State:
  """The state at the beginning of a step: at `gram.load_at` the teacher becomes the gram teacher."""
  if not has_own_teacher(config) or config.gram.load_at is None:
    return state
  due = (state.step >= num_steps(config.gram.load_at)) & (state.counters["gram_loaded"] == 0)
  return _copied(state, due, "gram_loaded")


def refresh(config: Any, state: State) -> State:
  """The state at the end of a step, `state.step` already raised: the teacher replaces the gram teacher when due."""
  if not has_own_teacher(config) or config.gram.refresh.every is None:
    return state
  rule = config.gram.refresh
  due = loaded(config, state) & (state.step % num_steps(rule.every) == 0)
  if rule.first is not None:
    due &= state.step >= num_steps(rule.first)
  if rule.max is not None:
    due &= state.counters["gram_refreshes"] < rule.max
  return _copied(state, due, "gram_refreshes")


def _copied(state: State, due: Bool[Array, ""], counter: str) -> State:
  gram_teacher = jax.tree.map(lambda new, old: jnp.where(due, new, old), state.teacher["backbone"], state.gram_teacher)
  counters = state.counters | {counter: state.counters[counter] + due}
  return state.replace(gram_teacher=gram_teacher, counters=counters)


def features(
  config: Any, backbone: nn.Module, state: State, batch: Batch, teacher_patches: Float[Array, "R N E"] | None
) -> Float[Array, "R N D"] | None:
  """The patch features that anchor the student's, on its grid; zeros while there is no gram teacher; None: never any.

  Args:
    backbone: the student's architecture, which is that of the gram teacher.
    batch: normalised; the gram teacher sees `gram_crops` where there are any, else the global crops.
    teacher_patches: of a teacher that is shared, on the global crops, rows in the order of image, then crop; None: not
      computed yet, it is then the EMA teacher.
  """
  if not enabled(config):
    return None
  if is_shared(config):
    if teacher_patches is not None:
      return teacher_patches
    crops = batch["global_crops"]  # [B, 2, H, W, 3]
    return backbone.apply({"params": state.teacher["backbone"]}, crops.reshape(-1, *crops.shape[2:])).patches
  crops = batch.get("gram_crops", batch["global_crops"])  # [B, 2, Hg, Wg, 3]

  def forward() -> Array:
    patches = backbone.apply({"params": state.gram_teacher}, crops.reshape(-1, *crops.shape[2:])).patches  # [2B, Ng, D]
    from_grid, to_grid = (_grid(x, backbone.stride) for x in (crops, batch["global_crops"]))
    if from_grid == to_grid:
      return patches
    maps = patches.reshape(patches.shape[0], *from_grid, patches.shape[-1])  # [2B, hg, wg, D]
    resized = resize_map(maps, to_grid, method=config.gram.resize, antialias=config.gram.antialias)
    return resized.reshape(patches.shape[0], -1, patches.shape[-1])  # [2B, N, D]

  if config.gram.source is not None:
    return forward()
  shape = jax.eval_shape(forward)
  return jax.lax.cond(loaded(config, state), forward, lambda: jnp.zeros(shape.shape, shape.dtype))


def _grid(crops: Float[Array, "B 2 H W 3"], stride: int) -> tuple[int, int]:
  return crops.shape[2] // stride, crops.shape[3] // stride


def terms(
  config: Any, student: Float[Array, "R N D"], teacher: Float[Array, "R N E"], batch: Batch
) -> dict[str, Float[Array, ""]]:
  """The Gram loss as "gram"; with `gram.stats` also, without gradient, "gram_masked" and "gram_unmasked".

  Args:
    student: patches of the masked global crops.
    teacher: of the same crops: `features`; of another width where another model teaches.
    batch: its masks say which patches are masked, and its loss groups which share a matrix.
  """

  def loss(patches: Array, tokens: str, *, per_image: bool) -> Array:
    rows = (x if per_image else _matrices(x, batch, tokens) for x in (patches, teacher))
    return losses.gram(*rows, normalize=config.gram.normalize, remove_negative=config.gram.remove_negative)

  found = {"gram": loss(student, config.gram.tokens, per_image=config.gram.per_image)}
  if config.gram.stats:
    frozen = jax.lax.stop_gradient(student)
    found |= {f"gram_{tokens}": loss(frozen, tokens, per_image=False) for tokens in ("masked", "unmasked")}
  return found


def logged(config: Any, state: State, terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """All the terms of a step as its metrics: those of Gram anchoring are 0 while there is no gram teacher."""
  if not enabled(config) or config.gram.source is not None:
    return terms
  there = loaded(config, state)
  return {name: jnp.where(there, x, 0.0) if name.startswith("gram") else x for name, x in terms.items()}


def _matrices(patches: Float[Array, "R N D"], batch: Batch, tokens: str) -> Float[Array, "groups M D"]:
  """The patches that share a Gram matrix: those of a loss group that are of the kind `tokens`."""
  groups = batch["mask_indices"].shape[0]
  grouped = patches.reshape(groups, -1, patches.shape[-1])  # [groups, 2 g N, D]
  if tokens == "all":
    return grouped
  indices = batch["mask_indices"]  # [groups, M]
  if tokens == "unmasked":  # the quota of a group is constant, and so is what it leaves
    hidden = batch["masks"].reshape(groups, -1)  # [groups, 2 g N]
    indices = jnp.argsort(hidden, axis=1, stable=True)[:, : hidden.shape[1] - indices.shape[1]]
  return jnp.take_along_axis(grouped, indices[..., None], axis=1)
