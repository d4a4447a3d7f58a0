"""Soft assignments of samples to prototypes, kept as scores and log factors."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import upcast


class Assignment(NamedTuple):
  """Probabilities p = exp(logits / temperature + prototype + sample), which no array holds.

  Every assignment of samples to prototypes that scales rows and columns of exp(logits / temperature) has this form:
  Sinkhorn-Knopp and centred softmax alike. The scores stay in the type they were computed in; the probabilities, which
  need float32, are made where and when they are used, for as many samples as fit.

  Attributes:
    logits: [..., K] teacher scores, of any float type.
    sample: [...] log factor of each sample, float32.
    prototype: [K] log factor of each prototype, float32. None: taken out by `rows`.
    temperature: []. None: taken out by `rows`.
  """

  logits: Array
  sample: Array
  prototype: Array | None
  temperature: Array | None

  def logs(self) -> Float[Array, "... K"]:
    """log p in float32."""
    return upcast(self.logits) / self.temperature + self.prototype + self.sample[..., None]

  def probs(self) -> Float[Array, "... K"]:
    """p in float32."""
    return jnp.exp(self.logs())

  def finite(self) -> Float[Array, ""]:
    """Whether all probabilities are: a score that is not finite shows in the factor of its sample."""
    return jnp.all(jnp.isfinite(self.sample))

  def rows(self) -> Assignment:
    """What each sample has for itself; `shared_with` undoes it."""
    return self._replace(prototype=None, temperature=None)

  def shared_with(self, whole: Assignment) -> Assignment:
    """Some of the `rows` of an assignment, with what all samples of the whole share."""
    return self._replace(prototype=whole.prototype, temperature=whole.temperature)

  def reshape(self, *leading: int) -> Assignment:
    """The samples in an array of another shape."""
    logits = self.logits.reshape(*leading, self.logits.shape[-1])
    return self._replace(logits=logits, sample=self.sample.reshape(leading))


def centered(logits: Float[Array, "N K"], center: Float[Array, " K"], temperature: float | Array) -> Assignment:
  """`softmax_center` as an assignment."""
  temperature = jnp.asarray(temperature, jnp.promote_types(logits.dtype, jnp.float32))
  prototype = -upcast(center) / temperature  # [K]
  sample = -jax.nn.logsumexp(upcast(logits) / temperature + prototype, axis=-1)  # [N]
  return Assignment(logits, sample, prototype, temperature)


def balanced(logits: Float[Array, "N K"], temperature: float | Array, *, iterations: int = 3) -> Assignment:
  """`sinkhorn_knopp` as an assignment.

  On logarithms: no overflow at any logit. Only the first iteration subtracts maxima. After it every probability is at
  most 1, and one of every row and of every column is at least 1 / (N K), since all rows or all columns sum to 1
  before they are scaled: sums of exponentials are safe as they are.
  """
  temperature = jnp.asarray(temperature, jnp.promote_types(logits.dtype, jnp.float32))
  scaled = upcast(logits) / temperature  # [N, K]
  prototype = -jax.nn.logsumexp(scaled, axis=0)  # [K]
  sample = -jax.nn.logsumexp(scaled + prototype, axis=1)  # [N]
  for _ in range(iterations - 1):
    prototype -= jnp.log(jnp.sum(jnp.exp(scaled + prototype + sample[:, None]), axis=0))
    sample -= jnp.log(jnp.sum(jnp.exp(scaled + prototype + sample[:, None]), axis=1))
  return Assignment(logits, sample, prototype, temperature)
