"""The HLO text of a compiled program, read: its instructions, how often they run, their traffic with the memory.

XLA's own cost analysis counts the body of a loop once. Here everything inside a loop counts as often as the loop runs:
the compiler writes the number of its iterations beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*\))? (?:-> .* )?\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations|true_computation|false_computation)=")
# Operations that move no data of their own: names, views, the ends of asynchronous pairs, and control flow, whose
# bodies are counted.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier", "optimization-barrier", "domain", "add-dependency"}


@dataclass(frozen=True)
class Instruction:
  """A line of HLO: `shape` its result's type as text, `rest` everything after the operands."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  root: bool
  literal: str


class Program:
  """The computations of a compiled module.

  Args:
    text: `compiled.as_text()`.
  """

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    current: list[Instruction] = []
    for line in text.splitlines():
      if line and not line[0].isspace():
        if head := _HEAD.match(line):
          current = self.computations[head[2]] = []
          self.entry = head[2] if head[1] else self.entry
      elif found := _LINE.match(line):
        current.append(_instruction(found[2], found[3], root=bool(found[1])))

  def times(self) -> dict[str, float]:
    """How often each computation runs in one step; those of fusions and of collectives' sums are not listed."""
    runs: dict[str, float] = {}

    def visit(name: str, number: float) -> None:
      runs[name] = runs.get(name, 0) + number
      for instruction in self.computations[name]:
        for called, factor in self._called(instruction):
          visit(called, number * factor)

    visit(self.entry, 1)
    return runs

  def _called(self, instruction: Instruction) -> Iterator[tuple[str, float]]:
    """(computation, runs) of what an instruction runs as instructions of their own."""
    factor = 1.0
    if instruction.opcode == "while":
      factor = self._trips(instruction)
    elif instruction.opcode not in ("call", "conditional", "async-start"):
      return
    for found in _CALLED.finditer(instruction.rest):
      for name in _names_after(instruction.rest, found.end()):
        if name in self.computations:
          yield name, factor

  def _trips(self, loop: Instruction) -> float:
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return float(found[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    limits = [
      int(i.literal)
      for i in self.computations.get(condition[1] if condition else "", [])
      if i.opcode == "constant" and i.literal.isdigit()
    ]
    return float(max(limits, default=1))

  def shapes(self, name: str) -> dict[str, str]:
    """The result types of a computation's instructions."""
    return {instruction.name: instruction.shape for instruction in self.computations[name]}

  def fused(self, instruction: Instruction) -> list[Instruction]:
    """The instructions inside a fusion (or an asynchronous operation)."""
    found = re.search(r"\bcalls=%?([\w.\-]+)", instruction.rest)
    return self.computations.get(found[1], []) if found else []


def memory_traffic(program: Program, *, fast: bool) -> float:
  """Bytes that one step reads from and writes to the device's memory: operands and results of everything that runs.

  Of an operand that a fusion only slices, and of a result that it only updates in part, the part counts. What caches
  keep between two operations is counted all the same.

  Args:
    fast: memory space 1 is on the chip (a TPU's VMEM) and does not count.
  """
  total = 0.0
  for name, runs in program.times().items():
    shapes = program.shapes(name)
    for instruction in program.computations[name]:
      total += runs * _traffic(program, instruction, shapes, fast)
  return total


def _traffic(program: Program, instruction: Instruction, shapes: dict[str, str], fast: bool) -> float:
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(("-done", "-update")) or opcode == "async-start":
    return 0
  shape = instruction.shape
  if opcode == "custom-call":  # a library's work space is among its results
    shape = re.sub(r", s8\[\d+\]\{0\}\)$", ")", shape)
  result = bytes_of(shape, fast=fast)
  operands = [bytes_of(shapes.get(name, ""), fast=fast) for name in instruction.operands]
  if opcode.removesuffix("-start") in COLLECTIVES:
    return 2 * sum(operands)
  if opcode in ("copy-start", "dynamic-slice", "slice", "gather", "broadcast"):
    return (sum(operands) if opcode == "copy-start" else result) * 2
  if opcode in ("dynamic-update-slice", "scatter"):
    return 2 * sum(operands[1:])
  if opcode != "fusion":
    return result + sum(operands)
  inner = program.fused(instruction)
  sizes = {i.name: bytes_of(i.shape, fast=fast) for i in inner}
  for parameter in (i for i in inner if i.opcode == "parameter"):
    index = int(parameter.literal)
    if index < len(operands):
      operands[index] = min(operands[index], _read(program, parameter.name, inner, fast))
  for update in (i for i in inner if i.opcode == "dynamic-update-slice"):
    if sizes[update.name] <= result:
      result -= max(0, sizes[update.name] - sizes.get(update.operands[1], 0))
  return result + sum(operands)


def _read(program: Program, name: str, inner: list[Instruction], fast: bool) -> int:
  """Bytes that a fusion needs of one of its values: the slices where it is only sliced, nothing where it is updated."""
  sizes, total = {i.name: bytes_of(i.shape, fast=fast) for i in inner}, 0
  for user in (i for i in inner if name in i.operands):
    if user.opcode in ("bitcast", "reshape", "transpose", "copy", "get-tuple-element"):
      total += _read(program, user.name, inner, fast) if not user.root else sizes[name]
    elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
      total += sizes[user.name]
    elif user.opcode == "fusion":  # a TPU's products have the fusions of their operands inside
      total += _read_by_fusion(program, name, user, fast)
    elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
      return sizes[name]
  return min(total, sizes[name])


def _read_by_fusion(program: Program, name: str, fusion: Instruction, fast: bool) -> int:
  inner = program.fused(fusion)
  places = {str(i) for i, operand in enumerate(fusion.operands) if operand == name}
  parameters = [i.name for i in inner if i.opcode == "parameter" and i.literal in places]
  return sum(_read(program, parameter, inner, fast) for parameter in parameters)


def arrays_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """(type, shape) of the arrays of a result's type."""
  return [(kind, tuple(int(size) for size in sizes.split(",") if size)) for kind, sizes, _ in _SHAPE.findall(shape)]


def bytes_of(shape: str, *, fast: bool = False) -> int:
  """Bytes of a type, the parts of a tuple added; with `fast` those in memory space 1 are left out."""
  total = 0
  for kind, sizes, layout in _SHAPE.findall(shape):
    if fast and "S(1)" in layout:
      continue
    bits = _BITS.get(kind)
    if bits is None:
      found = re.search(r"\d+", kind)
      bits = int(found[0]) if found else 0
    total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
  return total


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  shape, text = text[:end], text[end:].lstrip()
  opcode, _, _ = text.partition("(")
  start = len(opcode)
  end = _closing(text, start)
  inside = text[start + 1 : end]
  return Instruction(name, shape, opcode, tuple(_NAME.findall(inside)), text[end + 1 :], root, inside)


def _closing(text: str, start: int) -> int:
  """The parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  return len(text)


def _names_after(text: str, start: int) -> list[str]:
  """The names of a value that follows "key=": one, or several in braces."""
  if text[start] == "{":
    return _NAME.findall(text[start : text.index("}", start)])
  found = re.match(r"%?([\w.\-]+)", text[start:])
  return [found[1]] if found else []
