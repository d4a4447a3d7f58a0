"""Whether what a training step sends between devices is sound: parameters, gradients and sums, but no activations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations

from jax.sharding import Mesh

from vit_jax.inspect.collectives import Moved


def moved_activations(
  found: Iterable[Moved],
  mesh: Mesh,
  parameters: Iterable[tuple[int, ...]],
  *,
  batch_axes: Iterable[str],
  largest_sum: int,
  prototypes: Iterable[int] = (),
) -> list[Moved]:
  """The collectives of a training step that move activations or logits; a sound step has none.

  What may move: parameters and their gradients, whole or in parts (ZeRO, data parallelism); partial sums of
  activations along axes that do not divide the batch (tensor parallelism); sums over the images, which have no axis of
  images. Parameters are known by their number of elements, so the sizes of a program that is to be judged must not
  coincide.

  Args:
    found: see `inspect.collectives.moved`.
    mesh: of the program.
    parameters: shapes of all of them.
    batch_axes: mesh axes over which the images are spread.
    largest_sum: elements of the largest sum over images that is no gradient, such as a covariance.
    prototypes: numbers of prototypes: where `tensor` divides them, no device should have all scores of a token.
  """
  sizes = _parts(parameters, mesh)
  batch_axes, logits = set(batch_axes), set(prototypes) if mesh.shape["tensor"] > 1 else set()

  def moves(one: Moved) -> bool:
    if one.size in sizes or not one.axes:
      return False
    if one.kind != "all-reduce":
      return True
    return one.size > largest_sum and (bool(batch_axes & set(one.axes)) or bool(logits & set(one.shape)))

  return [one for one in found if moves(one)]


def _parts(parameters: Iterable[tuple[int, ...]], mesh: Mesh) -> set[int]:
  """Elements of every parameter, of a layer's share of it, and of what a part of the mesh's axes makes of these."""
  shares = {math.prod(some) for n in range(len(mesh.shape) + 1) for some in combinations(mesh.shape.values(), n)}
  sizes = set()
  for shape in parameters:
    for whole in {math.prod(shape), math.prod(shape[1:])}:
      sizes |= {whole // share for share in shares if whole % share == 0}
  return sizes
