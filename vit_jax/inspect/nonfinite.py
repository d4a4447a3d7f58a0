"""Where a computation first leaves the finite numbers: which operation of which layer.

The function is traced and rebuilt with a flag beside every floating-point value, so that one compiled run, on any mesh,
tells for every operation (and for every turn of every loop: for every layer) whether it made a NaN or an infinity. The
names come from `jax.named_scope`, which Flax opens for every module.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Operations that only wrap a function, by the parameter that holds it.
_WRAPPERS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Operations that only move or mark values: their outputs are as finite as their inputs, and no news.
_MOVES = ("broadcast_in_dim", "copy", "name", "neg", "reshape", "reshard", "sharding_constraint", "squeeze",
          "stop_gradient", "transpose")  # fmt: skip
_OPAQUE = ("while", "cond", "scatter-add", "scatter", "custom_linear_solve")  # looked at from outside


@dataclasses.dataclass(frozen=True)
class Event:
  """An operation that made a value which is not finite.

  Attributes:
    where: names of scopes and modules, "student/backbone/blocks[3]/mlp/fc1"; [i] counts turns of a loop.
    operation: name of the primitive.
    backward: whether it is part of a gradient.
  """

  where: str
  operation: str
  backward: bool

  def __str__(self) -> str:
    return f"{self.where or '(top level)'}: {self.operation}{' of the gradient' if self.backward else ''}"


class _Site(NamedTuple):
  """A place in the program: `position` alternates between places and loops (None), the outermost first."""

  position: tuple[int | None, ...]
  path: tuple[str, ...]
  operation: str
  reverse: tuple[bool, ...]


class _Value(NamedTuple):
  """An array; whether it has a value that is not finite; whether that is a fault and not an intended infinity."""

  array: Any
  nonfinite: Any
  fault: Any


def find_nonfinite(function: Callable, *args: Any) -> tuple[Any, list[Event]]:
  """`function(*args)`, and every operation of it that gave a value which is not finite, in the order of execution.

  Infinities that the program writes itself, such as the minus infinity of a mask, are no fault; values that are not
  finite in the arguments are, from the first operation that uses them.
  """
  closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
  sites: list[_Site] = []

  def flagged(*flat: Any) -> tuple[list[Any], list[Any]]:
    values = [_Value(array, _nonfinite(array), _nonfinite(array)) for array in flat]
    found: list[tuple[_Site, Any]] = []
    out = _evaluate(closed.jaxpr, closed.consts, values, _Place(), found)
    sites[:] = [site for site, _ in found]
    return [value.array for value in out], [flag for _, flag in found]

  leaves = jax.tree.leaves(args)
  # A single run: on CPU, compiling costs more than optimising saves.
  options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
  compiled = jax.jit(flagged).lower(*leaves).compile(options if jax.default_backend() == "cpu" else None)
  arrays, flags = compiled(*leaves)
  events = []
  for site, flag in zip(sites, jax.device_get(flags), strict=True):
    for turns in np.argwhere(flag):
      events.append((_order(site, turns), _event(site, turns)))
  events.sort(key=lambda pair: pair[0])
  return jax.tree.unflatten(jax.tree.structure(shape), arrays), [event for _, event in events]


@dataclasses.dataclass(frozen=True)
class _Place:
  position: tuple[int | None, ...] = ()
  path: tuple[str, ...] = ()
  reverse: tuple[bool, ...] = ()

  def inside(self, index: int, equation: Any) -> _Place:
    return _Place((*self.position, index), (*self.path, str(equation.source_info.name_stack)), self.reverse)

  def turning(self, reverse: bool) -> _Place:
    return _Place((*self.position, None), (*self.path, "[]"), (*self.reverse, reverse))


def _evaluate(
  jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[_Value], place: _Place, found: list[tuple[_Site, Any]]
) -> list[_Value]:
  """The values of a program; appends (site, flag) of each of its operations."""
  env = dict(zip(jaxpr.invars, args, strict=True))
  env |= {v: _Value(c, _nonfinite(c), jnp.zeros((), bool)) for v, c in zip(jaxpr.constvars, consts, strict=True)}

  def read(atom: Any) -> _Value:
    if isinstance(atom, Literal):
      return _Value(atom.val, _nonfinite(atom.val), jnp.zeros((), bool))
    return env[atom]

  for index, equation in enumerate(jaxpr.eqns):
    values, here = [read(atom) for atom in equation.invars], place.inside(index, equation)
    name = equation.primitive.name
    inner = next((equation.params[key] for key in _WRAPPERS if key in equation.params), None)
    if name == "scan":
      out = _scan(equation, values, here, found)
    elif inner is not None and name not in _OPAQUE:
      inner, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
      out = _evaluate(inner, consts, values, here, found)
    else:
      out = _apply(equation, values, here, found)
    env |= dict(zip(equation.outvars, out, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, values: list[_Value], place: _Place, found: list[tuple[_Site, Any]]) -> list[_Value]:
  """One operation: its outputs are at fault if its inputs were, or if these were finite."""
  bound = equation.primitive.get_bind_params(equation.params)
  functions, params = bound if isinstance(bound, tuple) else ((), bound)  # by version of jax
  with equation.ctx.manager:
    out = equation.primitive.bind(*functions, *(value.array for value in values), **params)
  outputs = list(out) if equation.primitive.multiple_results else [out]
  if equation.primitive.name in _MOVES and len(values) == len(outputs) == 1:
    return [values[0]._replace(array=outputs[0])]
  finite = ~_any(value.nonfinite for value in values)
  fault = _any(value.fault for value in values)
  results = [_Value(array, _nonfinite(array), _nonfinite(array) & (fault | finite)) for array in outputs]
  if any(_is_float(array) for array in outputs):
    site = _Site(place.position, place.path, equation.primitive.name, place.reverse)
    found.append((site, _any(result.fault for result in results)))
  return results


def _scan(equation: Any, values: list[_Value], place: _Place, found: list[tuple[_Site, Any]]) -> list[_Value]:
  """A loop: the flags of its operations get an axis that counts its turns."""
  params, inner = equation.params, equation.params["jaxpr"]
  first, second = _loop_arguments(equation, inner)
  consts, carry, scanned = values[:first], values[first:second], values[second:]
  place = place.turning(params["reverse"])
  sites: list[_Site] = []

  def turn(carry: list[_Value], rows: list[Any]) -> tuple[list[_Value], Any]:
    slices = [
      _Value(row, _nonfinite(row), _nonfinite(row) & whole.fault) for row, whole in zip(rows, scanned, strict=True)
    ]
    inside: list[tuple[_Site, Any]] = []
    out = _evaluate(inner.jaxpr, inner.consts, [*consts, *carry, *slices], place, inside)
    sites[:] = [site for site, _ in inside]
    return out[: len(carry)], (out[len(carry) :], [flag for _, flag in inside])

  carry, (stacked, flags) = jax.lax.scan(
    turn, carry, [value.array for value in scanned], length=params["length"], reverse=params["reverse"]
  )
  found += zip(sites, flags, strict=True)
  return [*carry, *(_Value(v.array, jnp.any(v.nonfinite), jnp.any(v.fault)) for v in stacked)]


def _loop_arguments(equation: Any, inner: Any) -> tuple[int, int]:
  """Where the carry of a loop begins among its arguments, and where what it is scanned over does.

  Told by the axes, as versions of JAX say it in different ways: what is stacked has one more outside than inside.
  """
  second = _unstacked(equation.invars, inner.in_avals)
  return second - _unstacked(equation.outvars, inner.out_avals), second


def _unstacked(variables: Sequence[Any], inside: Sequence[Any]) -> int:
  """How many of a loop's arguments, or results, have as many axes outside of it as inside."""
  return sum(variable.aval.ndim == one.ndim for variable, one in zip(variables, inside, strict=True))


def _is_float(array: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(array) if not hasattr(array, "dtype") else array.dtype, jnp.inexact)


def _nonfinite(array: Any) -> jax.Array:
  return ~jnp.all(jnp.isfinite(array)) if _is_float(array) else jnp.zeros((), bool)


def _any(flags: Any) -> jax.Array:
  total = jnp.zeros((), bool)
  for flag in flags:
    total |= flag
  return total


def _order(site: _Site, turns: Sequence[int]) -> tuple[int, ...]:
  """A key that sorts by time: turns count before places inside the loop, backwards where it runs backwards."""
  signed = iter([-int(turn) if reverse else int(turn) for turn, reverse in zip(turns, site.reverse, strict=True)])
  return tuple(next(signed) if entry is None else entry for entry in site.position)


def _event(site: _Site, turns: Sequence[int]) -> Event:
  numbers, names, index = iter(turns), [], None
  for part in site.path:
    if part == "[]":
      index = int(next(numbers))
      continue
    for name in _names(part):
      names.append(name if index is None else f"{name}[{index}]")
      index = None
  if index is not None:
    names.append(f"[{index}]")
  return Event("/".join(names), site.operation, any("transpose(" in part for part in site.path))


def _names(stack: str) -> list[str]:
  """The scopes of a name stack that mean something to people: no transformations, methods, classes, repetitions."""
  plain = re.sub(r"\b(jvp|transpose|vmap|remat)\(|\)", "", stack)
  kept = [name for name in plain.split("/") if re.fullmatch(r"[a-z]\w*", name) and name not in ("checkpoint", "while")]
  return [name for before, name in zip([None, *kept], kept, strict=False) if name != before]
