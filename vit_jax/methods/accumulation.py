"""Exact gradient accumulation: a batch in micro-batches, with the loss and the gradient of the whole batch.

Losses that are means over rows may be taken micro-batch by micro-batch. A term that couples rows of the whole batch
(KoLeo among all images) cannot: its gradient needs all features at once. As in GradCache (Gao et al. 2021) a first pass
without gradient collects the features, the gradient of the term with respect to them is taken, and the second pass
feeds each micro-batch its share of it through the same forward pass, with the same random draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.models.features import Draws
from vit_jax.ops.normalize import upcast

Params = Any
Part = tuple[Any, ...]  # (…, draws): of one micro-batch or of the whole batch
Terms = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class MicroBatches:
  """A batch of `groups` loss groups as `num` micro-batches of whole loss groups.

  Micro-batch m has the loss groups m, m + num, m + 2 num, …: where the batch is spread over devices, every device has
  an equal share of every micro-batch and nothing moves between them.

  Attributes:
    num: number of micro-batches; 1 changes nothing.
    groups: loss groups of the whole batch, a multiple of `num`.
  """

  num: int
  groups: int

  def __post_init__(self) -> None:
    if self.groups % self.num:
      raise ValueError(
        f"micro_batches={self.num}: must divide the {self.groups} loss groups of a batch: change it, "
        "loss_group_size or batch_size."
      )

  def split(self, tree: Any) -> Any:
    """Arrays [groups * r, ...] as [num, groups / num * r, ...]; r may differ between them."""

    def split(x: jax.Array) -> jax.Array:
      strided = x.reshape(self.groups // self.num, self.num, x.shape[0] // self.groups, *x.shape[1:])
      return strided.swapaxes(0, 1).reshape(self.num, x.shape[0] // self.num, *x.shape[1:])

    return jax.tree.map(split, tree)

  def merge(self, tree: Any) -> Any:
    """Undoes `split`: the rows of all micro-batches in the order of the batch."""

    def merge(x: jax.Array) -> jax.Array:
      rows, per_group = x.shape[0] * x.shape[1], x.shape[0] * x.shape[1] // self.groups
      grouped = x.reshape(self.num, self.groups // self.num, per_group, *x.shape[2:])
      return grouped.swapaxes(0, 1).reshape(rows, *x.shape[2:])

    return jax.tree.map(merge, tree)

  def split_draws(self, draws: Sequence[Draws]) -> list[Draws]:
    """The random choices of the whole batch for each micro-batch, along a new leading axis."""

    def parts(x: jax.Array) -> jax.Array:  # [..., groups, m] -> [num, ..., groups / num, m]
      return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, self.num, x.shape[-1]), -2, 0)

    return [jax.tree.map(parts, draw) for draw in draws]

  def map(self, function: Callable[[Any], Any], batch: Any) -> Any:
    """`function(batch)` of a function that treats rows alike, one micro-batch after the other."""
    if self.num == 1:
      return function(batch)
    return self.merge(jax.lax.map(function, self.split(batch)))

  def value_and_grad(
    self,
    local: Callable[[Params, Part], tuple[jax.Array, Terms, Any]],
    across: Callable[[Any], tuple[jax.Array, Terms]],
    params: Params,
    inputs: Part,
    *,
    first_pass: Callable[[Params, Part], Any] | None,
  ) -> tuple[jax.Array, Terms, Any, Params]:
    """Loss, terms, features and gradient of local + across(features), of the batch as a whole.

    Gradients are accumulated in float32; the memory is that of the activations of one micro-batch.

    Args:
      local: (params, inputs) -> (loss, terms, features); loss and terms are means over the rows of the inputs, the
        features are a tree of arrays [rows, ...].
      across: features of all rows, in the order of the batch -> (loss, terms).
      params: what the gradient is taken of.
      inputs: (targets, batch, draws): trees of arrays [rows, ...], and the random choices.
      first_pass: (params, inputs) -> the features that `local` returns, computed without the rest. None: `across` is a
        mean over loss groups, so that it may be taken within each micro-batch, and one pass is enough.
    """

    def whole(params: Params, part: Part) -> tuple[jax.Array, tuple[Terms, Any]]:
      loss, terms, features = local(params, part)
      more, more_terms = across(features)
      return loss + more, (terms | more_terms, features)

    if self.num == 1:
      (loss, (terms, features)), grads = jax.value_and_grad(whole, has_aux=True)(params, inputs)
      return loss, terms, features, grads
    *rows, draws = inputs
    parts = (*self.split(rows), self.split_draws(draws))
    if first_pass is None:
      return self._mean(whole, params, parts)

    features = jax.lax.map(lambda part: first_pass(params, part), parts)  # [num, rows, ...]
    (loss, terms), pull = jax.value_and_grad(lambda f: across(self.merge(f)), has_aux=True)(features)

    def injected(params: Params, scanned: tuple[Part, Any]) -> tuple[jax.Array, tuple[Terms, Any]]:
      part, pull = scanned
      value, terms, features = local(params, part)
      return value + self.num * _pulled(features, pull), (terms, features)  # _mean divides by num

    mean, mean_terms, features, grads = self._mean(injected, params, (parts, pull))
    return mean + loss, mean_terms | terms, features, grads

  def _mean(
    self, function: Callable[[Params, Part], tuple[jax.Array, tuple[Terms, Any]]], params: Params, parts: Any
  ) -> tuple[jax.Array, Terms, Any, Params]:
    """Value, terms and gradient of the mean of `function` over the micro-batches, and the features of all rows."""
    value_and_grad = jax.value_and_grad(function, has_aux=True)

    def add(total: Params, part: Part) -> tuple[Params, Any]:
      with jax.named_scope("micro_batch"):
        value, grads = value_and_grad(params, part)
      return jax.tree.map(lambda t, g: t + g.astype(t.dtype) / self.num, total, grads), value

    zeros = jax.tree.map(lambda p: jnp.zeros_like(upcast(p)), params)
    grads, (losses, (terms, features)) = jax.lax.scan(add, zeros, parts)
    return jnp.mean(losses), jax.tree.map(lambda x: jnp.mean(x, axis=0), terms), self.merge(features), grads


def _pulled(features: Any, pull: Any) -> jax.Array:
  """Zero, with the gradient `pull` with respect to `features`."""

  def one(f: jax.Array, p: jax.Array) -> jax.Array:
    return jnp.sum(upcast(p) * (upcast(f) - upcast(jax.lax.stop_gradient(f))))

  return sum(jax.tree.leaves(jax.tree.map(one, features, pull)))
