"""From what a teacher sees in a batch to what the student should say: the assignment of tokens to prototypes."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vit_jax.losses.assignment import Assignment, balanced, centered
from vit_jax.ops.normalize import upcast

Centers = dict[str, Float[Array, " K"]]
HEADS = ("dino", "ibot")


class TeacherOutputs(NamedTuple):
  """What the teacher sees in a batch.

  Attributes:
    cls: [2B, K] logits of the class tokens of the global crops.
    patches: [groups * M, K] logits of the masked patches.
    features: [2B, D] class tokens.
    similarity: [2B] of patches by name: see `diagnostics.similarity`.
    anchor: [2B, N, D] patch features, where they are to anchor the student's; else None.
  """

  cls: Array
  patches: Array
  features: Array
  similarity: dict[str, Array]
  anchor: Array | None = None


class Targets(NamedTuple):
  """What the student should say about a batch.

  Attributes:
    cls: assignment of the class tokens of the global crops, [2B, K].
    patches: assignment of the masked patches, [groups * M, K].
    anchor: [2B, N, D] patch features whose similarities the student's keep; None: no Gram anchoring, or by features
      that `gram.features` has yet to compute.
  """

  cls: Assignment
  patches: Assignment
  anchor: Array | None = None

  def rows(self) -> Targets:
    """What can be cut into micro-batches: arrays of as many rows as there are tokens; see `shared_with`."""
    return self._replace(cls=self.cls.rows(), patches=self.patches.rows())

  def shared_with(self, whole: Targets) -> Targets:
    """The `rows` of a micro-batch, with what all tokens of the whole batch share."""
    return self._replace(cls=self.cls.shared_with(whole.cls), patches=self.patches.shared_with(whole.patches))


@jax.named_scope("targets")
def assign(
  outputs: TeacherOutputs, temperature: jax.Array, centers: Centers | None = None, *, chunk: int | None = None
) -> Targets:
  """The assignments of class tokens and of masked patches.

  By softmax for a head that has a centre, else by Sinkhorn-Knopp over all the tokens of the batch; `chunk` is
  `losses.chunk`.
  """

  def one(head: str, logits: Float[Array, "N K"]) -> Assignment:
    if centers and head in centers:
      return centered(logits, centers[head], temperature, chunk=chunk)
    return balanced(logits, temperature, chunk=chunk)

  targets = Targets(cls=one("dino", outputs.cls), patches=one("ibot", outputs.patches), anchor=outputs.anchor)
  return jax.lax.stop_gradient(targets)


class CenteredHead(NamedTuple):
  """A head whose scores become targets by a softmax, less their running mean.

  Attributes:
    prototypes: K.
    momentum: of the running mean.
  """

  prototypes: int
  momentum: float


@dataclasses.dataclass(frozen=True)
class Centering:
  """The running means of the teacher's scores, for the heads that need one; the others use Sinkhorn-Knopp."""

  heads: dict[str, CenteredHead]

  @classmethod
  def of(cls, config: Any) -> Centering:
    """What a config asks for."""
    sections = {head: config[head] for head in HEADS if config[head].centering == "softmax"}
    return cls({head: CenteredHead(values.prototypes, values.center_momentum) for head, values in sections.items()})

  def init(self) -> dict[str, Centers]:
    """Zero centres as a part of a fresh state: {"centers": ...}, or nothing."""
    return {"centers": {name: jnp.zeros(head.prototypes) for name, head in self.heads.items()}} if self.heads else {}

  def moved(
    self, own: dict[str, Any], outputs: TeacherOutputs, batch: dict[str, jax.Array], keep: Bool[Array, ""]
  ) -> dict[str, Any]:
    """`own` with the centres for the next step: moved towards the mean scores of this batch, over all devices.

    Of class tokens that is the plain mean. Of patches it is the mean over the masked crops of the mean over the masked
    patches of each, as in the published code: an image with many masked patches counts no more than one with few.

    Args:
      own: that of the state.
      outputs: of the whole batch.
      keep: leaves the centres as they are: the step is skipped.
    """
    if not self.heads:
      return own
    share = batch["mask_weights"].reshape(-1, 1)  # [groups * M, 1]  1 / masked patches of the crop
    means = {"dino": lambda: jnp.mean(upcast(outputs.cls), axis=0)}
    if outputs.patches.shape[0]:  # without masks there is nothing to move towards
      means["ibot"] = lambda: jnp.sum(share * upcast(outputs.patches), axis=0) / jnp.sum(share)
    moved = dict(own["centers"])
    for name in self.heads.keys() & means.keys():
      momentum, before = self.heads[name].momentum, moved[name]
      moved[name] = jnp.where(keep, before, momentum * before + (1 - momentum) * means[name]())
    return own | {"centers": moved}
