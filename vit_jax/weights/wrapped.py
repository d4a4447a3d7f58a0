"""Where in a checkpoint the backbone is: whatever is wrapped around it, its own names are at the end of the names.

One mechanism for all: every tensor whose name ends as a tensor that a backbone has once says by the rest of its name
where a backbone is. Of several the averaged one is taken, as everybody does; what stays ambiguous is an error that
lists the addresses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.weights.errors import WeightsError, shown
from vit_jax.weights.lazy import LazyTensor
from vit_jax.weights.numpy_pickles import array_in
from vit_jax.weights.pickles import Foreign

# Names that a backbone has once; the longest that fits a name counts. Then others, by which a broken one is found.
_ONCE = re.compile(
  r"(?:^|\.)(?:embeddings\.patch_embeddings\.(?:projection\.)?weight|patch_embed\.proj\.weight|"
  r"stages\.0\.downsample_layers\.0\.weight|downsample_layers\.0\.0\.weight)$"
)
_OTHERWISE = re.compile(
  r"(?:^|\.)(?:(?:embeddings\.)?(?:cls_token|position_embeddings)|pos_embed|rope_embed\.periods|"
  r"(?:blocks|layer|encoder\.layer)\.\d+\.(?:\d+\.)?(?:norm1|layernorm_before)\.weight)$"
)
_CHUNKED = re.compile(r"blocks\.\d{1,9}\.(\d{1,9})\.")
# What torch puts into names when it compiles, shards or recomputes a module.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_AVERAGED = re.compile(r"(?:^|_)ema(?:_|$|model)")
_DEEPEST, _MOST_NAMES, _LONGEST_NAME = 16, 1_000_000, 1000

Place = tuple[str, ...]


class Part(NamedTuple):
  """A backbone in a checkpoint.

  Attributes:
    prefix: what its names begin with, from the outermost key on, such as "teacher.backbone."; empty: nothing.
    tensors: by name, without it.
    siblings: tensors by sub-module that are heads of the same network ("dino_head").
    renamed: what else was changed of its names, in words.
    others: what there is besides, in words.
  """

  prefix: str
  tensors: dict[str, Any]
  siblings: dict[str, dict[str, Any]]
  renamed: tuple[str, ...]
  others: tuple[str, ...]


class _Content(NamedTuple):
  """A checkpoint, flat: tensors by the place of the dict that has them, and what else there is."""

  tensors: dict[Place, dict[str, Any]]
  rest: list[str]
  wrappers: tuple[str, ...]


def find(content: Mapping[Any, Any], heads: Sequence[str], wanted: str | None = None) -> Part:
  """The backbone in the content of a checkpoint.

  Args:
    content: nested dicts and lists with tensors.
    heads: names of sub-modules that go with a backbone.
    wanted: the beginning of the names of the one that is wanted, of several.

  Raises:
    WeightsError: if there is none, or several of which none is the averaged one.
  """
  flat = _flatten(content)
  candidates = _candidates(flat)
  if wanted is not None:
    candidates = _those_wanted(candidates, wanted)
  if not candidates:
    everything = {".".join((*place, name)): t for place, found in flat.tensors.items() for name, t in found.items()}
    return Part("", everything, {}, (), tuple(flat.rest))
  best = min(map(_rank, candidates))
  chosen = [candidate for candidate in candidates if _rank(candidate) == best]
  if len(chosen) > 1:
    names = ", ".join(repr(shown(_address(candidate))) for candidate in chosen[:5])
    raise WeightsError(
      f"it holds {len(chosen)} backbones: {names}{', …' if len(chosen) > 5 else ''}; say which after the path, as in "
      f"FILE#{shown(_address(chosen[0]))}."
    )
  return _part(flat, chosen[0], heads)


def _flatten(content: Mapping[Any, Any]) -> _Content:
  tensors: dict[Place, dict[str, Any]] = {}
  rest: list[str] = []
  removed: set[str] = set()
  todo: list[tuple[Place, Any]] = [((), content)]
  count = 0
  while todo:
    place, node = todo.pop()
    found: dict[str, Any] = {}
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
      count += 1
      value = value if (array := array_in(value)) is None else array
      if count > _MOST_NAMES or len(place) > _DEEPEST:
        raise WeightsError("its content is nested or repeated more than that of any checkpoint.")
      name = key if type(key) is str else shown(str(key)) if isinstance(key, int) and abs(key) < 2**63 else "…"
      if _is_tensor(value) and len(name) > _LONGEST_NAME:
        rest.append(f"{shown(name)} (a name of {len(name)} characters)")
      elif _is_tensor(value):
        found[shown(name, _LONGEST_NAME)] = value
      elif isinstance(value, Mapping) or type(value) in (list, tuple):
        todo.append(((*place, shown(name)), value))
      elif isinstance(value, Foreign) and value.items:
        todo.append(((*place, shown(name)), value.items))
      elif isinstance(value, Foreign):
        rest.append(shown(".".join((*place, name))) + f" ({shown(str(value))})")
    if found:
      plain, wrappers = _without_wrappers(found)
      removed |= wrappers
      tensors.setdefault(place, {}).update(plain)
  return _Content(tensors, rest, tuple(wrapper for wrapper in _WRAPPERS if wrapper in removed))


def _is_tensor(value: Any) -> bool:
  return isinstance(value, LazyTensor | np.ndarray)


def _without_wrappers(tensors: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
  """The tensors by their names in the module before torch wrapped it, and the wrappers; as they are, if those clash."""
  if not any(wrapper in name for name in tensors for wrapper in _WRAPPERS):
    return tensors, set()
  plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): t for name, t in tensors.items()}
  if len(plain) < len(tensors):
    return tensors, set()
  return plain, {part for name in tensors for part in name.split(".") if part in _WRAPPERS}


def _candidates(flat: _Content) -> list[tuple[Place, str]]:
  """Where backbones are: the place of a dict, and what their names in it begin with."""
  for pattern in (_ONCE, _OTHERWISE):
    found = {
      (place, name[: match.start() + name[match.start()].count(".")]): None
      for place, tensors in flat.tensors.items()
      for name in tensors
      if (match := pattern.search(name))
    }
    if found:
      return list(found)
  return []


def _those_wanted(candidates: list[tuple[Place, str]], wanted: str) -> list[tuple[Place, str]]:
  wanted = wanted.strip(".")
  exact = [candidate for candidate in candidates if _address(candidate) == wanted]
  inside = exact or [candidate for candidate in candidates if f"{_address(candidate)}.".startswith(f"{wanted}.")]
  if not inside:
    there = ", ".join(repr(shown(_address(candidate))) for candidate in candidates[:5]) or "none"
    raise WeightsError(f"it holds no backbone under {shown(wanted)!r}; there is {there}.")
  return inside


def _address(candidate: tuple[Place, str]) -> str:
  return ".".join((*candidate[0], candidate[1])).strip(".")


def _rank(candidate: tuple[Place, str]) -> int:
  """The averaged network first. Where a student learns from a frozen teacher, that is not the teacher."""
  words = _address(candidate).lower().split(".")
  if any(_AVERAGED.search(word) for word in words):
    return 0
  parts = [word.split("_") for word in words]
  return 1 if any("teacher" in part and "gram" not in part for part in parts) else 2


def _part(flat: _Content, chosen: tuple[Place, str], heads: Sequence[str]) -> Part:
  place, prefix = chosen
  around = flat.tensors[place]
  own = {name[len(prefix) :]: tensor for name, tensor in around.items() if name.startswith(prefix)}
  own, renamed = _unchunked(own)
  stem = prefix.removesuffix("backbone.") if f".{prefix}".endswith(".backbone.") else None
  siblings = {
    head: {name[len(begin) :]: tensor for name, tensor in around.items() if name.startswith(begin)}
    for head in heads
    if stem is not None and any(name.startswith(begin := f"{stem}{head}.") for name in around)
  }
  wrappers = tuple(f"{wrapper}. taken out of the names" for wrapper in flat.wrappers)
  full = "".join(f"{part}." for part in place) + prefix
  return Part(full, own, siblings, wrappers + renamed, (*_besides(flat, chosen), *sorted(flat.rest)))


def _unchunked(tensors: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
  """Names of blocks without the chunks that DINOv2 divides them into for sharding: a block keeps its number."""
  if not any(_CHUNKED.match(name) for name in tensors):
    return tensors, ()
  plain = {re.sub(rf"^{_CHUNKED.pattern}", r"blocks.\1.", name): tensor for name, tensor in tensors.items()}
  if len(plain) < len(tensors):
    raise WeightsError(
      "its blocks are in chunks (blocks.CHUNK.BLOCK.) that number their blocks from 0 on, each: rename them to "
      "blocks.BLOCK. first."
    )
  return plain, ("chunks of blocks taken out of the names",)


def _besides(flat: _Content, chosen: tuple[Place, str]) -> list[str]:
  """Beginnings of the names of the tensors that are not the backbone's."""
  place, prefix = chosen
  counts: dict[str, int] = {}
  for other, tensors in flat.tensors.items():
    for name in tensors:
      if other == place and name.startswith(prefix):
        continue
      path = [*other, *name.split(".")]
      own = [*place, *prefix.split(".")]
      shared = next((i for i, (a, b) in enumerate(zip(path, own, strict=False)) if a != b), 0)
      begin = ".".join(path[: shared + 1])
      counts[begin] = counts.get(begin, 0) + 1
  return [shown(name) for name in sorted(counts)]
