"""Pickles of others, read without running anything: an interpreter of the opcodes that make data.

Python's own unpickler calls what a pickle names, and lets it change what it was given. This one knows no objects but
plain values, containers and what a caller builds for a few names; everything else is a `Foreign`, which holds what the
pickle says of it and does nothing. Its time and its memory are bounded by the number of opcodes.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vit_jax.weights.errors import Unreadable

_SCALARS = (str, int, float, bool, bytes, type(None))
# Of the standard library, what holds data. Its other names in a pickle are there to be called.
_DATA = {
  "builtins": ("set", "frozenset", "complex", "bytearray", "slice", "range", "object", "type", "dict", "list", "tuple",
               "int", "float", "str", "bool", "bytes", "NoneType", "Ellipsis", "NotImplemented"),
  "functools": ("partial",), "re": ("_compile",), "_codecs": ("encode",), "types": ("SimpleNamespace",),
  "copyreg": ("_reconstructor", "__newobj__", "__newobj_ex__"),
  "argparse": ("Namespace",), "collections": (), "datetime": (), "decimal": (), "enum": (), "fractions": (),
  "pathlib": (), "random": ("Random",), "typing": (), "uuid": (), "zoneinfo": (), "logging": ("Logger", "getLogger"),
}  # fmt: skip
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # since Python 2

_CONSTANTS = {"N": None, "\x88": True, "\x89": False, ")": ()}
_NUMBERS = {"K": "<B", "M": "<H", "J": "<i", "G": ">d"}
_TEXTS = {"\x8c": "<B", "X": "<I", "\x8d": "<Q"}  # with the form of their length
_OLD_TEXTS = {"U": "<B", "T": "<i"}
_BYTES = {"C": "<B", "B": "<I", "\x8e": "<Q", "\x96": "<Q"}
_LONGS = {"\x8a": "<B", "\x8b": "<i"}
_PUTS, _GETS = {"q": "<B", "r": "<I"}, {"h": "<B", "j": "<I"}
_TUPLES = {"\x85": 1, "\x86": 2, "\x87": 3}


class Name(NamedTuple):
  """A class or a function that a pickle names."""

  module: str
  name: str

  def __str__(self) -> str:
    return f"{self.module}.{self.name}"


class Foreign:
  """What a pickle makes of a class or function that is not known: said, not done.

  Attributes:
    name: the class or function.
    arguments: what it would have been called with.
    state: what it would have been given; None: nothing.
    items: what a dict of a class of its own holds (EasyDict, Config); None: nothing.
  """

  __slots__ = ("arguments", "items", "name", "state")

  def __init__(self, name: Any, arguments: tuple[Any, ...]):
    self.name, self.arguments, self.state = name, arguments, None
    self.items: dict[Any, Any] | None = None

  def __str__(self) -> str:
    if str(self.name) == "copyreg._reconstructor" and self.arguments and isinstance(self.arguments[0], Name):
      return str(self.arguments[0])  # the class, of which this function would make an object
    return str(self.name) if isinstance(self.name, Name) else type(self.name).__name__


def load(
  data: bytes | memoryview,
  builders: Mapping[str, Callable[..., Any]],
  persistent: Callable[[Any], Any] | None = None,
  *,
  start: int = 0,
  most: int,
) -> tuple[Any, int]:
  """What a pickle holds, and where it ends.

  Args:
    data: its bytes.
    builders: by full name, what is made of the arguments of the known classes and functions.
    persistent: what is made of references to what lies outside the pickle.
    start: where it begins.
    most: the number of opcodes that it may have.

  Raises:
    Unreadable, or any exception of Python's for bytes that make no sense: see `errors.reading`.
  """
  return _Machine(memoryview(data), builders, persistent, start).run(most)


class _Machine:
  """A stack of values, and the stacks that marks have put aside."""

  def __init__(self, data: memoryview, builders: Mapping[str, Callable], persistent: Callable | None, start: int):
    self._data, self._at = data, start
    self._builders, self._persistent = builders, persistent
    self._stack: list[Any] = []
    self._marked: list[list[Any]] = []
    self._memo: dict[int, Any] = {}

  def run(self, most: int) -> tuple[Any, int]:
    data = self._data
    for _ in range(most):
      if self._at >= len(data):
        raise Unreadable("its pickle is cut short")
      code = chr(data[self._at])
      self._at += 1
      if code == ".":
        return self._stack.pop(), self._at
      stack = self._stack  # a mark replaces it
      if code in _CONSTANTS:
        stack.append(_CONSTANTS[code])
      elif code in _NUMBERS:
        stack.append(self._number(_NUMBERS[code]))
      elif code in _GETS:
        stack.append(self._memo[self._number(_GETS[code])])
      elif code in _PUTS:
        self._memo[self._number(_PUTS[code])] = stack[-1]
      elif code == "\x94":  # memoize
        self._memo[len(self._memo)] = stack[-1]
      elif code in _TEXTS:
        stack.append(str(self._take(self._number(_TEXTS[code])), "utf-8", "surrogatepass"))
      elif code in _TUPLES:
        count = _TUPLES[code]
        self._need(count)
        stack[-count:] = [tuple(stack[-count:])]
      elif code in self._OTHERS:
        self._OTHERS[code](self)
      else:
        raise Unreadable(f"it is no pickle that is read here (opcode {ord(code):#04x} at byte {self._at - 1})")
    raise Unreadable(f"it makes more objects than such a file has ({most} operations)")

  def _take(self, count: int) -> memoryview:
    if not 0 <= count <= len(self._data) - self._at:
      raise Unreadable("its pickle is cut short")
    self._at += count
    return self._data[self._at - count : self._at]

  def _number(self, form: str) -> Any:
    return struct.unpack(form, self._take(struct.calcsize(form)))[0]

  def _line(self) -> str:
    window = bytes(self._data[self._at : self._at + 1000])
    return str(self._take(window.index(b"\n") + 1)[:-1], "utf-8")

  def _need(self, count: int) -> None:
    if len(self._stack) < count:
      raise Unreadable("its pickle is damaged")

  def _mark(self) -> None:
    self._marked.append(self._stack)
    self._stack = []

  def _since_mark(self) -> list[Any]:
    found, self._stack = self._stack, self._marked.pop()
    return found

  def _tuple(self) -> None:
    found = tuple(self._since_mark())
    self._stack.append(found)

  def _append(self) -> None:
    self._extend([self._stack.pop()])

  def _extend(self, values: list[Any]) -> None:
    target = self._stack[-1]
    if type(target) is list:
      target.extend(values)
    elif not isinstance(target, Foreign):
      raise Unreadable("it appends to what is no list")

  def _set_item(self) -> None:
    self._need(3)
    value, key = self._stack.pop(), self._stack.pop()
    self._update([key, value])

  def _update(self, flat: list[Any]) -> None:
    target = self._stack[-1]
    if isinstance(target, Foreign):
      target.items = target = {} if target.items is None else target.items
    if type(target) is not dict or len(flat) % 2:
      raise Unreadable("it sets items of what is no dict")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
      target[_as_key(key)] = value

  def _global(self) -> None:
    module, name = self._line(), self._line()
    self._stack.append(_checked(module, name))

  def _stack_global(self) -> None:
    name, module = self._stack.pop(), self._stack.pop()
    self._stack.append(_checked(module, name))

  def _reduce(self) -> None:
    arguments, name = self._stack.pop(), self._stack.pop()
    if type(arguments) is not tuple:
      raise Unreadable("it calls with what are no arguments")
    self._stack.append(self._made(name, arguments))

  def _new_object_with_names(self) -> None:
    self._stack.pop()  # the named arguments
    self._reduce()

  def _made(self, name: Any, arguments: tuple[Any, ...]) -> Any:
    build = self._builders.get(str(name)) if isinstance(name, Name) else None
    if build is not None:
      return build(*arguments)
    if isinstance(name, Name) and name.module == "collections" and name.name in ("OrderedDict", "defaultdict"):
      return _dict_of(arguments if name.name == "OrderedDict" else arguments[1:])
    return Foreign(name, arguments)

  def _build(self) -> None:
    state = self._stack.pop()
    target = self._stack[-1]
    if isinstance(target, Foreign):
      target.state = state

  def _refer(self) -> None:
    if self._persistent is None:
      raise Unreadable("it refers to what is not in it")
    self._stack.append(self._persistent(self._stack.pop()))

  def _push(self, value: Any) -> None:
    self._stack.append(value)

  def _duplicate(self) -> None:
    self._stack.append(self._stack[-1])

  def _pop(self) -> None:
    if self._stack:
      self._stack.pop()
    else:
      self._since_mark()

  _OTHERS: Mapping[str, Callable[[_Machine], Any]] = {
    "}": lambda self: self._push({}),
    "]": lambda self: self._push([]),
    "\x8f": lambda self: self._push([]),  # a set
    "(": _mark,
    "t": _tuple,
    "l": lambda self: self._push(self._since_mark()),
    "\x91": lambda self: self._push(self._since_mark()),  # a frozen set
    "a": _append,
    "e": lambda self: self._extend(self._since_mark()),
    "\x90": lambda self: self._extend(self._since_mark()),  # items of a set
    "s": _set_item,
    "u": lambda self: self._update(self._since_mark()),
    "c": _global,
    "\x93": _stack_global,
    "R": _reduce,
    "\x81": _reduce,  # a new object
    "\x92": _new_object_with_names,
    "b": _build,
    "Q": _refer,
    "2": _duplicate,
    "0": _pop,
    "1": _since_mark,
    "\x80": lambda self: self._take(1),  # protocol
    "\x95": lambda self: self._take(8),  # frame
  } | {
    **{c: lambda self, form=form: self._push(str(self._take(self._number(form)), "latin-1"))
       for c, form in _OLD_TEXTS.items()},
    **{c: lambda self, form=form: self._push(bytes(self._take(self._number(form)))) for c, form in _BYTES.items()},
    **{c: lambda self, form=form: self._push(int.from_bytes(self._take(self._number(form)), "little", signed=True))
       for c, form in _LONGS.items()},
  }  # fmt: skip


def _checked(module: Any, name: Any) -> Name:
  """A name, unless it is one that only an attack has.

  Nothing would come of it here; but who opens such a file should know what it is.
  """
  if type(module) is not str or type(name) is not str:
    raise Unreadable("it names what is no name")
  module = _RENAMED.get(module, module)
  top = module.partition(".")[0]
  if top in sys.stdlib_module_names and (module not in _DATA or (_DATA[module] and name not in _DATA[module])):
    raise Unreadable(
      f"it contains {module}.{name}; only tensors and plain containers are loaded, because a pickle can run any "
      "code. If you trust the file, load it with torch and save its state dict alone"
    )
  return Name(module, name)


def _as_key(key: Any) -> Any:
  """A key that is hashed at once: nested tuples, each within the next twice, would take for ever."""
  if isinstance(key, (*_SCALARS, Foreign, Name)) or type(key).__hash__ is object.__hash__:
    return key
  if type(key) is tuple and all(isinstance(part, _SCALARS) for part in key):
    return key
  raise Unreadable(f"it has a {type(key).__name__} as a key of a dict")


def _dict_of(arguments: tuple[Any, ...]) -> dict[Any, Any]:
  if not arguments:
    return {}
  (pairs,) = arguments
  if type(pairs) is dict:
    return dict(pairs)
  if type(pairs) is not list or any(type(pair) not in (tuple, list) or len(pair) != 2 for pair in pairs):
    raise Unreadable("it has an OrderedDict of what are no pairs")
  return {_as_key(key): value for key, value in pairs}
