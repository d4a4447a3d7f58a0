"""A training state as a plain tree of arrays: the form in which checkpoints hold it.

Any pytree (dataclass, optimizer tuples, dicts) becomes nested dicts keyed by the names on the way to each leaf, so a
checkpoint never depends on the Python classes that made it: static fields and `None` subtrees come from the state one
restores into, and any subtree can be read alone by its names. A *manifest* says what the leaves are:
`{"teacher/backbone/norm/scale": {"shape": [384], "dtype": "float32"}}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any
Manifest = dict[str, dict[str, Any]]
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]  # of an array, by its path and shape


class Mismatch(ValueError):
  """A checkpoint holds another state than what was asked of it."""


def leaves_by_path(tree: PyTree) -> dict[tuple[str, ...], Any]:
  """The leaves of any pytree, keyed by the names (attributes, keys, indices) that lead to them."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    names = tuple(_name(entry) for entry in path)
    if names in leaves or any("/" in name for name in names):
      raise ValueError(f"Cannot save the leaf {names}: its names are not unique or contain a slash.")
    leaves[names] = leaf
  return leaves


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict:
  """Nested dicts from leaves keyed by path."""
  tree: dict = {}
  for path, leaf in leaves.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree


def is_key(leaf: Any) -> bool:
  """Whether a (possibly abstract) leaf is an array of typed PRNG keys."""
  return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
  """The array that stands for a leaf on disk: the data of typed PRNG keys, other leaves as they are."""
  if isinstance(leaf, jax.ShapeDtypeStruct) and is_key(leaf):
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
  if is_key(leaf):
    return jax.random.key_data(leaf)
  return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def like(array: jax.Array, leaf: Any) -> jax.Array:
  """Undoes `plain`: `array` as typed PRNG keys where `leaf` is that."""
  return jax.random.wrap_key_data(array, impl=_key_implementation(leaf)) if is_key(leaf) else array


def restore_argument(path: Sequence[str], shape: Sequence[int], sharding: Placement | None) -> ocp.RestoreArgs:
  """How Orbax is to read an array: whole as a numpy array, or spread over devices."""
  if sharding is None:
    return ocp.RestoreArgs(restore_type=np.ndarray)
  return ocp.ArrayRestoreArgs(sharding=sharding("/".join(path), tuple(shape)), global_shape=tuple(shape))


def manifest(leaves: Mapping[tuple[str, ...], Any]) -> Manifest:
  """Shape and dtype of every leaf (arrays or abstract arrays) by its path; typed keys are `key:<implementation>`."""
  return {"/".join(path): {"shape": list(np.shape(leaf)), "dtype": _dtype_name(leaf)} for path, leaf in leaves.items()}


def as_saved(leaves: Mapping[tuple[str, ...], Any], saved: Manifest) -> dict[tuple[str, ...], Any]:
  """The leaves by their paths in a checkpoint, in the same order.

  Steps saved before a method's own parts of the state were together under "own" have them beside it.
  """

  def before(path: tuple[str, ...]) -> bool:
    return path[0] == "own" and "/".join(path) not in saved and "/".join(path[1:]) in saved

  return {path[1:] if before(path) else path: leaf for path, leaf in leaves.items()}


def check(saved: Manifest, wanted: Manifest, where: str) -> None:
  """Raises one `Mismatch` that names every leaf in which the two differ."""
  lines = [f"  missing in the checkpoint: {path} {_describe(wanted[path])}" for path in wanted if path not in saved]
  lines += [f"  only in the checkpoint: {path} {_describe(saved[path])}" for path in saved if path not in wanted]
  lines += [
    f"  differs: {path} is {_describe(saved[path])} in the checkpoint, {_describe(wanted[path])} in this run"
    for path in wanted
    if path in saved and saved[path] != wanted[path]
  ]
  if lines:
    raise Mismatch(
      f"{where} was saved by another configuration; {len(lines)} leaves do not fit. Restore it with the configuration "
      "it was saved with (see config.json), or give a new --workdir.\n" + "\n".join(lines)
    )


def _name(entry: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  raise TypeError(f"Cannot name the pytree path entry {entry!r}.")


def _dtype_name(leaf: Any) -> str:
  return f"key:{_key_implementation(leaf)}" if is_key(leaf) else str(plain(leaf).dtype)


def _key_implementation(leaf: Any) -> str:
  found = []
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)  # also answers for abstract keys
  return str(found[0])


def _describe(entry: dict[str, Any]) -> str:
  return f"{entry['dtype']}{entry['shape']}"
