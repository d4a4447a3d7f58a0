"""Gram anchoring: the student's patches keep the similarities that they have for an earlier teacher.

DINOv3 (Siméoni et al. 2025), section 4: in long runs the patch features degrade while the class token improves; a gram
teacher, a backbone from before, anchors the Gram matrices of the patches. In the order of a step: `load` the teacher at
its step, `features` of the gram teacher, the `terms` of the loss, `refresh`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vit_jax import losses
from vit_jax.methods.base import State
from vit_jax.methods.dino.crops import Batch, flatten_crops
from vit_jax.methods.settings import num_steps
from vit_jax.ops.resize import resize_map

TEACHER = "gram_teacher"  # the part of `State.own` with its parameters
SHARED = ("ema", "teacher")  # values of gram.source: another teacher of the step serves


@dataclasses.dataclass(frozen=True)
class Anchoring:
  """How a run anchors Gram matrices, in plain values; durations in steps.

  Attributes:
    source: where the gram teacher comes from, as `gram.source` says; None: from `load_at`.
    load_at: before this step the teacher is copied to the gram teacher; None: never.
    refresh_first: no refresh before this step; None: from the start.
    refresh_every: steps from one later copy to the next; None: no refreshes.
    refresh_max: how many; None: no limit.
    normalize: L2-normalise the patch features.
    per_image: one Gram matrix a crop; False: one over all the patches of a loss group.
    tokens: patches that are compared: "all" | "masked" | "unmasked".
    remove_negative: negative similarities set to 0, as `losses.gram` says.
    resize: how larger feature maps come to the student's grid: "bicubic" | "bilinear".
    antialias: of this resizing.
    stats: also report the loss of masked and of unmasked patches.
  """

  source: str | None
  load_at: int | None = None
  refresh_first: int | None = None
  refresh_every: int | None = None
  refresh_max: int | None = None
  normalize: bool = True
  per_image: bool = True
  tokens: str = "all"
  remove_negative: str | None = None
  resize: str = "bicubic"
  antialias: bool = False
  stats: bool = False

  @classmethod
  def of(cls, config: Any) -> Anchoring | None:
    """What a resolved config asks for; None: no anchoring, at no step."""
    gram = config.gram
    if not enabled(config):
      return None

    def steps(duration: str | None) -> int | None:
      return None if duration is None else num_steps(duration)

    same = ("source", "normalize", "per_image", "tokens", "remove_negative", "resize", "antialias", "stats")
    return cls(
      **{name: gram[name] for name in same},
      load_at=steps(gram.load_at),
      refresh_first=steps(gram.refresh.first),
      refresh_every=steps(gram.refresh.every),
      refresh_max=gram.refresh.max,
    )

  @property
  def has_own_teacher(self) -> bool:
    """Whether the state holds a gram teacher: otherwise another teacher serves."""
    return self.source not in SHARED

  def loaded(self, state: State) -> Bool[Array, ""]:
    """Whether there is a gram teacher yet: without a source there is none before `load_at`."""
    if self.source is not None:
      return jnp.ones((), bool)
    return state.counters["gram_loaded"] > 0

  def load(self, state: State) -> State:
    """The state at the beginning of a step: at `load_at` the teacher becomes the gram teacher."""
    if not self.has_own_teacher or self.load_at is None:
      return state
    due = (state.step >= self.load_at) & (state.counters["gram_loaded"] == 0)
    return _copied(state, due, "gram_loaded")

  def refresh(self, state: State) -> State:
    """The state at the end of a step, `state.step` already raised: the teacher replaces the gram teacher when due."""
    if not self.has_own_teacher or self.refresh_every is None:
      return state
    due = self.loaded(state) & (state.step % self.refresh_every == 0)
    if self.refresh_first is not None:
      due &= state.step >= self.refresh_first
    if self.refresh_max is not None:
      due &= state.counters["gram_refreshes"] < self.refresh_max
    return _copied(state, due, "gram_refreshes")

  def features(
    self, backbone: nn.Module, state: State, batch: Batch, teacher_patches: Float[Array, "R N E"] | None
  ) -> Float[Array, "R N D"]:
    """The patch features that anchor the student's, on its grid; zeros while there is no gram teacher.

    Args:
      backbone: the student's architecture, which is that of the gram teacher.
      batch: normalised; the gram teacher sees `gram_crops` where there are any, else the global crops.
      teacher_patches: of a teacher that is shared, on the global crops, rows in the order of image, then crop; None:
        not computed yet, it is then the EMA teacher.
    """
    if not self.has_own_teacher:
      if teacher_patches is not None:
        return teacher_patches
      return backbone.apply({"params": state.teacher["backbone"]}, flatten_crops(batch["global_crops"])).patches
    crops = batch.get("gram_crops", batch["global_crops"])  # [B, 2, Hg, Wg, 3]

    def forward() -> Array:
      patches = backbone.apply({"params": state.own[TEACHER]}, flatten_crops(crops)).patches  # [2B, Ng, D]
      from_grid, to_grid = (_grid(x, backbone.stride) for x in (crops, batch["global_crops"]))
      if from_grid == to_grid:
        return patches
      maps = patches.reshape(patches.shape[0], *from_grid, patches.shape[-1])  # [2B, hg, wg, D]
      resized = resize_map(maps, to_grid, method=self.resize, antialias=self.antialias)
      return resized.reshape(patches.shape[0], -1, patches.shape[-1])  # [2B, N, D]

    if self.source is not None:
      return forward()
    shape = jax.eval_shape(forward)
    return jax.lax.cond(self.loaded(state), forward, lambda: jnp.zeros(shape.shape, shape.dtype))

  def terms(
    self, student: Float[Array, "R N D"], teacher: Float[Array, "R N E"], batch: Batch, *, groups: int
  ) -> dict[str, Float[Array, ""]]:
    """The Gram loss as "gram"; with `stats` also, without gradient, "gram_masked" and "gram_unmasked".

    Args:
      student: patches of the masked global crops.
      teacher: of the same crops: `features`; of another width where another model teaches.
      batch: its masks say which patches are masked.
      groups: loss groups of the batch; those of a group may share a matrix.
    """

    def loss(patches: Array, tokens: str, *, per_image: bool) -> Array:
      rows = (x if per_image else _matrices(x, batch, tokens, groups) for x in (patches, teacher))
      return losses.gram(*rows, normalize=self.normalize, remove_negative=self.remove_negative)

    found = {"gram": loss(student, self.tokens, per_image=self.per_image)}
    if self.stats:
      frozen = jax.lax.stop_gradient(student)
      found |= {f"gram_{tokens}": loss(frozen, tokens, per_image=False) for tokens in ("masked", "unmasked")}
    return found

  def logged(self, state: State, terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """All the terms of a step as its metrics: those of Gram anchoring are 0 while there is no gram teacher."""
    if self.source is not None:
      return terms
    there = self.loaded(state)
    return {name: jnp.where(there, x, 0.0) if name.startswith("gram") else x for name, x in terms.items()}


def init(config: Any, backbone: Any) -> tuple[dict[str, Any], dict[str, jax.Array]]:
  """The gram teacher of a fresh state, a copy of the teacher's backbone, as a part of `State.own`; and its counters.

  The counters are "gram_loaded", copies made by `gram.load_at` (0 or 1), and "gram_refreshes".
  """
  if not has_own_teacher(config):
    return {}, {}
  zero = jnp.zeros((), jnp.int32)
  return {TEACHER: jax.tree.map(jnp.copy, backbone)}, {"gram_loaded": zero, "gram_refreshes": zero}


def has_own_teacher(config: Any) -> bool:
  """Whether the state holds a gram teacher: otherwise there is no anchoring, or another teacher serves."""
  return enabled(config) and config.gram.source not in SHARED


def enabled(config: Any) -> bool:
  """Whether a config anchors Gram matrices, at least from some step on."""
  return config.gram.source is not None or config.gram.load_at is not None


def has_own_pass(config: Any, *, distilling: bool) -> bool:
  """Whether features are computed for the anchor alone: not where the teacher of the targets has them already."""
  return enabled(config) and config.gram.source != ("teacher" if distilling else "ema")


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


def _copied(state: State, due: Bool[Array, ""], counter: str) -> State:
  before = state.own[TEACHER]
  after = jax.tree.map(lambda new, old: jnp.where(due, new, old), state.teacher["backbone"], before)
  counters = state.counters | {counter: state.counters[counter] + due}
  return state.replace(own=state.own | {TEACHER: after}, counters=counters)


def _grid(crops: Float[Array, "B 2 H W 3"], stride: int) -> tuple[int, int]:
  return crops.shape[2] // stride, crops.shape[3] // stride


def _matrices(patches: Float[Array, "R N D"], batch: Batch, tokens: str, groups: int) -> Float[Array, "groups M D"]:
  """The patches that share a Gram matrix: those of a loss group that are of the kind `tokens`."""
  grouped = patches.reshape(groups, -1, patches.shape[-1])  # [groups, 2 g N, D]
  if tokens == "all":
    return grouped
  indices = batch["mask_indices"]  # [groups, M]
  if tokens == "unmasked":  # the quota of a group is constant, and so is what it leaves
    hidden = batch["masks"].reshape(groups, -1)  # [groups, 2 g N]
    indices = jnp.argsort(hidden, axis=1, stable=True)[:, : hidden.shape[1] - indices.shape[1]]
  return jnp.take_along_axis(grouped, indices[..., None], axis=1)
