"""From a gradient to the next state: clipping, AdamW by parameter groups, freezing, the moving average.

Every method learns through it. A step whose loss or gradient is not finite changes nothing but the counters.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from vit_jax.methods.base import Metrics, Params, State
from vit_jax.methods.settings import num_steps
from vit_jax.optim import ema, optimizer


def fresh_moments(config: Any, params: Params) -> Any:
  """The optimizer's state for fresh parameters."""
  return optimizer.adam(config.optim.b1, config.optim.b2, config.optim.eps).init(params)


class Rates(NamedTuple):
  """What the schedules say of one step: scalars.

  Attributes:
    lr: learning rate.
    weight_decay: of the parameters that decay.
    momentum: of the moving average; None: the state has no teacher.
  """

  lr: jax.Array
  weight_decay: jax.Array
  momentum: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Learner:
  """The optimizer of a run, in plain values.

  Attributes:
    b1, b2, eps: of AdamW (Loshchilov & Hutter 2019).
    clip: limit of the gradient norm of each sub-module; 0: none.
    layerwise_decay: factor of the learning rate from a block to the one before it.
    patch_embed_lr: further factor of the patch embedding.
    decay_downsample_norms: see `optimizer.groups`.
    freeze_last_layer: steps for which prototype layers keep learning rate 0.
    freeze_backbone: steps for which the backbone keeps its parameters, while heads learn.
  """

  b1: float
  b2: float
  eps: float
  clip: float
  layerwise_decay: float
  patch_embed_lr: float
  decay_downsample_norms: bool = False
  freeze_last_layer: int = 0
  freeze_backbone: int = 0

  @classmethod
  def of(cls, config: Any) -> Learner:
    """The learner that a resolved config describes."""
    optim = config.optim
    return cls(
      b1=optim.b1,
      b2=optim.b2,
      eps=optim.eps,
      clip=optim.clip,
      layerwise_decay=optim.layerwise_decay,
      patch_embed_lr=optim.patch_embed_lr,
      decay_downsample_norms=optim.decay_downsample_norms,
      freeze_last_layer=num_steps(optim.freeze_last_layer),
      freeze_backbone=num_steps(config.init.freeze_backbone_steps),
    )

  def update(self, state: State, loss: jax.Array, grads: Params, rates: Rates) -> tuple[State, Metrics]:
    """The state after a step, and the norms of the gradients before clipping.

    Args:
      state: before the step.
      loss: its loss, which decides with the gradients whether the step counts.
      grads: float32, like `state.student`.
      rates: of this step.
    """
    words = "losses are computed in float32, in float64 where the inputs are"
    chex.assert_type(loss, jnp.promote_types(loss.dtype, jnp.float32), custom_message=words)
    with jax.named_scope("optimizer"):
      grads, norms = optimizer.clip(grads, self.clip)
      student, opt_state = optimizer.adamw_update(
        state.student,
        grads,
        state.opt_state,
        optimizer.groups(
          state.student,
          layerwise_decay=self.layerwise_decay,
          patch_embed_lr=self.patch_embed_lr,
          decay_downsample_norms=self.decay_downsample_norms,
        ),
        lr=rates.lr,
        last_layer_lr=jnp.where(state.step < self.freeze_last_layer, 0.0, rates.lr),
        weight_decay=rates.weight_decay,
        b1=self.b1,
        b2=self.b2,
        eps=self.eps,
      )
      student = self._hold_backbone(state.step, student, state.student)
      teacher = state.teacher
      if rates.momentum is not None:
        teacher = ema.update(teacher, student, rates.momentum)
        teacher = self._hold_backbone(state.step, teacher, state.teacher)

    chex.assert_trees_all_equal_shapes_and_dtypes(
      (student, teacher, opt_state),
      (state.student, state.teacher, state.opt_state),
      custom_message="a step keeps the shapes and types of its state",
    )
    finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    nonfinite = jnp.where(finite, 0, state.counters["nonfinite"] + 1)
    with jax.named_scope("optimizer"):
      student, teacher, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (student, teacher, opt_state),
        (state.student, state.teacher, state.opt_state),
      )
    state = state.replace(
      step=state.step + 1,
      student=student,
      teacher=teacher,
      opt_state=opt_state,
      counters=state.counters | {"nonfinite": nonfinite},
    )
    return state, {f"grad_norm/{name}": norm for name, norm in norms.items()} | {"nonfinite": nonfinite}

  def _hold_backbone(self, step: jax.Array, new: Params, old: Params) -> Params:
    """`new`, with the backbone of `old` while it is frozen.

    Nothing else is held: Adam's moments of the backbone go on, as they do for frozen prototypes, so that its first own
    step is as well scaled as any other.
    """
    if not self.freeze_backbone:
      return new
    frozen = step < self.freeze_backbone
    backbone = jax.tree.map(lambda n, o: jnp.where(frozen, o, n), new["backbone"], old["backbone"])
    return new | {"backbone": backbone}
