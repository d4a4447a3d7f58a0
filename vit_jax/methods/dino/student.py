"""What a student does with its targets: DINO on class tokens, iBOT on masked patches, KoLeo, Gram anchoring.

The objective of DINOv2 (Oquab et al. 2023) and DINOv3 (Siméoni et al. 2025), the same whether the targets come from the
student's own moving average or from a frozen teacher.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax import losses
from vit_jax.methods import diagnostics
from vit_jax.methods.accumulation import MicroBatches
from vit_jax.methods.base import Batch, Metrics, Params, State
from vit_jax.methods.dino import prototypes
from vit_jax.methods.dino.crops import Normalization, flatten_crops, gather_masked, split_crops
from vit_jax.methods.dino.gram import Anchoring
from vit_jax.methods.dino.networks import Modules, modules
from vit_jax.methods.dino.targets import Targets
from vit_jax.methods.learner import Learner, Rates
from vit_jax.methods.settings import build_schedules
from vit_jax.models import Features
from vit_jax.models.features import Draws
from vit_jax.optim.schedules import Schedule, scale_lr


class Teaching(NamedTuple):
  """How a student stands to the teacher of its targets.

  Attributes:
    teacher: the word of `gram.source` for this teacher, whose patches the targets bring along.
    masked: whether the student's global crops are masked; iBOT is at the masked positions either way.
    watched: whether the student's own features are among the metrics; those of a moving average are watched instead.
  """

  teacher: str
  masked: bool
  watched: bool


SELF_DISTILLATION = Teaching(teacher="ema", masked=True, watched=False)  # by the moving average of the student
DISTILLATION = Teaching(teacher="teacher", masked=False, watched=True)  # by a frozen model


@dataclasses.dataclass(frozen=True)
class Objective:
  """The terms of the loss and their weights, in plain values.

  Attributes:
    dino_weight, ibot_weight, koleo_weight: of each term.
    ignore_diagonal: DINO leaves out the pairs of one global crop with itself.
    koleo_topk: nearest neighbours that KoLeo pushes away.
    koleo_group_size: images among which they are sought.
    loss_group_size: images of a loss group.
    chunk: tokens whose prototype scores are there at once; None: see `losses.prototypes`.
  """

  dino_weight: float
  ibot_weight: float
  koleo_weight: float
  ignore_diagonal: bool
  koleo_topk: int
  koleo_group_size: int
  loss_group_size: int
  chunk: int | None

  @classmethod
  def of(cls, config: Any) -> Objective:
    """What a resolved config asks for."""
    return cls(
      dino_weight=config.dino.loss_weight,
      ibot_weight=config.ibot.loss_weight,
      koleo_weight=config.koleo.loss_weight,
      ignore_diagonal=config.dino.ignore_diagonal,
      koleo_topk=config.koleo.topk,
      koleo_group_size=config.koleo.group_size,
      loss_group_size=config.loss_group_size,
      chunk=config.losses.chunk,
    )

  @property
  def couples_groups(self) -> bool:
    """Whether `spread` takes neighbours from several loss groups: then it needs the whole batch at once."""
    return bool(self.koleo_weight) and self.koleo_group_size > self.loss_group_size

  def spread(self, cls: Float[Array, "B*G D"], num_global: int) -> tuple[jax.Array, Metrics]:
    """KoLeo of the class tokens of the global crops, weighted, and unweighted by name."""
    if not self.koleo_weight:
      return jnp.zeros(()), {}
    koleo = grouped_koleo(cls, self.koleo_group_size, self.koleo_topk, num_global)
    return self.koleo_weight * num_global * koleo, {"koleo": koleo}


@dataclasses.dataclass(frozen=True)
class Student:
  """A student and how it learns.

  Attributes:
    net: its modules.
    objective: the terms of its loss.
    anchoring: of its Gram matrices; None: there is none.
    learner: its optimizer.
    schedules: by name, functions of the step.
    normalization: of its crops.
    micro_batches: parts of a batch, for gradient accumulation.
    teaching: how it stands to the teacher of its targets.
  """

  net: Modules
  objective: Objective
  anchoring: Anchoring | None
  learner: Learner
  schedules: dict[str, Schedule]
  normalization: Normalization
  micro_batches: int
  teaching: Teaching

  @classmethod
  def of(cls, config: Any, teaching: Teaching) -> Student:
    """The student that a resolved config describes."""
    anchoring = Anchoring.of(config)
    schedules = build_schedules(config, scale_lr(config.batch_size, config.optim.lr_scaling))
    if anchoring is None:
      del schedules["gram_loss_weight"]
    return cls(
      net=modules(config),
      objective=Objective.of(config),
      anchoring=anchoring,
      learner=Learner.of(config),
      schedules=schedules,
      normalization=Normalization(config.augment.mean, config.augment.std),
      micro_batches=config.micro_batches,
      teaching=teaching,
    )

  @property
  def shares_patches(self) -> bool:
    """Whether the patches of its targets' teacher anchor its own."""
    return self.anchoring is not None and self.anchoring.source == self.teaching.teacher

  def groups(self, batch: Batch) -> int:
    """Loss groups of a batch, or of a micro-batch."""
    return batch["global_crops"].shape[0] // self.objective.loss_group_size

  def parts(self, batch: Batch) -> MicroBatches:
    """How a batch is cut for gradient accumulation."""
    return MicroBatches(self.micro_batches, groups=self.groups(batch))

  def learn(self, state: State, batch: Batch, targets: Targets) -> tuple[State, Metrics]:
    """One step: losses, gradients, the learner's update, and what Gram anchoring does around it."""
    now = {name: schedule(state.step) for name, schedule in self.schedules.items()}
    if self.anchoring is not None:
      state = self.anchoring.load(state)
      now["gram_loss_weight"] *= self.anchoring.loaded(state)
    num_global = batch["global_crops"].shape[1]
    draws = self.draw(state.student, batch, jax.random.fold_in(state.key, state.step))

    def local(student: Params, part: Any) -> tuple[jax.Array, Metrics, Array]:
      rows, batch, draws = part
      batch = self.normalization(batch)
      anchor = None
      if self.anchoring is not None:
        with jax.named_scope("gram_teacher"):
          given = rows.anchor if self.shares_patches else None
          anchor = self.anchoring.features(self.net.backbone, state, batch, given)
      with jax.named_scope("student"):
        own = rows.shared_with(targets)._replace(anchor=anchor)
        return self.loss(student, own, batch, draws, now["local_loss_weight"], now.get("gram_loss_weight"))

    def first_pass(student: Params, part: Any) -> Array:
      with jax.named_scope("student"):
        return self.global_cls(student, *part)

    def across(cls: Array) -> tuple[jax.Array, Metrics]:
      with jax.named_scope("koleo"):
        return self.objective.spread(cls, num_global)

    loss, terms, cls, grads = self.parts(batch).value_and_grad(
      local,
      across,
      state.student,
      (targets.rows(), batch, draws),
      first_pass=first_pass if self.objective.couples_groups else None,
    )
    rates = Rates(now["lr"], now["weight_decay"], now["momentum"])
    state, learned = self.learner.update(state, loss, grads, rates)
    if self.anchoring is not None:
      state = self.anchoring.refresh(state)
      terms = self.anchoring.logged(state, terms)
    watched = diagnostics.features(cls) if self.teaching.watched else {}
    return state, {"loss": loss} | terms | now | learned | watched

  @jax.named_scope("draws")
  def draw(self, student: Params, batch: Batch, key: jax.Array) -> list[Draws]:
    """The random choices of the student's pass over the global and the local crops of a batch."""
    drop_path_key, rope_key = jax.random.split(key)
    rows = [batch[name].shape[0] * batch[name].shape[1] for name in _seen(batch)]
    return self.net.backbone.apply(
      {"params": student["backbone"]},
      rows,
      groups=self.groups(batch),
      rngs={"drop_path": drop_path_key, "rope": rope_key},
      method="draw",
    )

  def features(self, student: Params, batch: Batch, draws: list[Draws], names: tuple[str, ...]) -> list[Features]:
    """Features of the crops with these names, in one pass; the global crops may carry the iBOT masks.

    Args:
      student: parameters.
      batch: normalised.
      draws: for global and local crops.
      names: "global_crops" first.
    """
    masks = batch["masks"].reshape(-1, batch["masks"].shape[-1])  # [2B, N]
    return self.net.backbone.apply(
      {"params": student["backbone"]},
      [flatten_crops(batch[name]) for name in names],
      masks=[masks if self.teaching.masked and name == "global_crops" else None for name in names],
      train=True,
      groups=self.groups(batch),
      draws=draws[: len(names)],
    )

  def loss(
    self,
    student: Params,
    targets: Targets,
    batch: Batch,
    draws: list[Draws],
    local_loss_weight: jax.Array,
    gram_loss_weight: jax.Array | None = None,
  ) -> tuple[jax.Array, Metrics, Array]:
    """The weighted sum of the losses that are means over images, and these unweighted by name.

    Args:
      student: parameters.
      targets: of these images.
      batch: normalised; one micro-batch, or the whole batch.
      draws: of these images.
      local_loss_weight: further factor of the local DINO term.
      gram_loss_weight: of the Gram term, where there is one.

    Returns:
      The sum, the terms (and diagnostics), and the class tokens of the global crops [2B, D], for `Objective.spread`.
    """
    images, num_global = batch["global_crops"].shape[:2]
    objective = self.objective
    whole, *parts = self.features(student, batch, draws, _seen(batch))
    num_local, width = batch["local_crops"].shape[1], whole.cls.shape[-1]
    local_cls = parts[0].cls if parts else jnp.zeros((0, width), whole.cls.dtype)  # [B * L, D]
    hidden = gather_masked(whole.patches, batch["mask_indices"])  # [groups * M, D]
    with jax.named_scope("dino_head"):
      total, terms = prototypes.dino(
        self.net.dino_head,
        student["dino_head"],
        split_crops(whole.cls, images),
        local_cls.reshape(images, num_local, width),
        targets.cls,
        weight=objective.dino_weight,
        local_loss_weight=local_loss_weight,
        ignore_diagonal=objective.ignore_diagonal,
        chunk=objective.chunk,
      )
    with jax.named_scope("ibot_head"):
      patches_total, more = prototypes.ibot(
        self.net.ibot_head,
        student["ibot_head"],
        hidden,
        targets.patches,
        batch["mask_weights"],
        weight=objective.ibot_weight,
        num_crops=num_global * images,
        chunk=objective.chunk,
      )
    total, terms = total + patches_total, terms | more
    if self.anchoring is not None:
      with jax.named_scope("gram"):
        terms |= self.anchoring.terms(whole.patches, targets.anchor, batch, groups=self.groups(batch))
      total += gram_loss_weight * terms["gram"]
    if self.teaching.watched:
      terms |= diagnostics.means(diagnostics.similarity(whole.cls, whole.patches))
    return total, terms, whole.cls

  def global_cls(self, student: Params, targets: Targets, batch: Batch, draws: list[Draws]) -> Float[Array, "R D"]:
    """The class tokens that `loss` returns, without the rest of it; the batch is not normalised yet."""
    return self.features(student, self.normalization(batch), draws, ("global_crops",))[0].cls


def _seen(batch: Batch) -> tuple[str, ...]:
  """The crops that a student sees: there may be no local ones."""
  return ("global_crops", "local_crops")[: 1 + bool(batch["local_crops"].shape[1])]


def grouped_koleo(cls: Float[Array, "R D"], group_size: int, topk: int, num_global: int) -> jax.Array:
  """KoLeo of each global crop within each group of `group_size` images, averaged."""
  crops = cls.reshape(-1, group_size, num_global, cls.shape[-1]).swapaxes(1, 2)  # [groups, 2, g, D]
  per_crop = jax.vmap(jax.vmap(lambda x: losses.koleo(x, topk=topk)))(crops)  # [groups, 2]
  return jnp.mean(per_crop)
