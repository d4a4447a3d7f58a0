"""Labels as they are stored, and the classes that they mean: the same rules for every source.

A label may be a whole number of any size (also as text or as a float, "3" or 3.0), a name, or a truth value. "007" is a
name. None, NaN, -1 and "" are no label. Classes are numbered once, without gaps, whatever the labels are: numbers in
their order, so that labels 0 … C - 1 keep theirs; names in alphabetical order; or both by a list of class names that
comes with the data, behind which labels that it does not know are added. A class without a name is called by its label.
"""

from __future__ import annotations

import decimal
import json
import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vit_jax.data import storage
from vit_jax.data.errors import BadImage
from vit_jax.data.left_out import printable

log = logging.getLogger(__name__)

CLASSES = "classes.json"  # beside shards: the list of class names
FIELDS = ("label", "labels", "fine_label", "cls", "class", "class_id")  # names of fields of labels, by precedence
LONGEST = 1000  # characters of a label
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0+)?")


class NoClass(ValueError):
  """What is stored as a label, but cannot mean a class; the message says what it is, as in "a list"."""


class Classes:
  """Which class a label means.

  Attributes:
    names: of the classes, in the order of their numbers.
  """

  def __init__(self, names: Sequence[str], numbers: dict[str, int]):
    """`numbers`: {label as `text_of` gives it: class}."""
    self.names = tuple(names)
    self._numbers = numbers

  def number(self, label: Any) -> int:
    """The class of a label; -1: none, or none that is known."""
    try:
      text = text_of(label)
    except NoClass:
      return -1
    return -1 if text is None else self._numbers.get(text, -1)


def text_of(label: Any) -> str | None:
  """A label as text; None: it is none.

  Raises:
    NoClass: if it can mean no class, as a list, a fraction or a megabyte of bytes.
  """
  if isinstance(label, np.ndarray | np.generic) and label.ndim == 0:
    label = label.item()
  if isinstance(label, bytes):
    if len(label) > 4 * LONGEST:
      raise NoClass(f"longer than {LONGEST:,} characters")
    try:
      label = label.decode("utf-8-sig")
    except UnicodeDecodeError:
      raise NoClass("bytes that are no text") from None
  if label is None:
    return None
  if isinstance(label, bool):
    return str(label)
  if isinstance(label, int | float | decimal.Decimal):
    return _text_of_number(label)
  if not isinstance(label, str):
    raise NoClass(f"a {type(label).__name__}")
  label = unicodedata.normalize("NFC", label.strip())
  if len(label) > LONGEST:
    raise NoClass(f"longer than {LONGEST:,} characters")
  if not label.isprintable():
    raise NoClass("no line of text")
  if (match := _WHOLE.fullmatch(label)) and int(match[1]) == -1:
    return None
  return None if label in ("", "nan", "NaN") else label


def _text_of_number(label: int | float | decimal.Decimal) -> str | None:
  if not isinstance(label, int):
    if label != label:  # NaN
      return None
    if not math.isfinite(label) or label != int(label):
      raise NoClass("a number that is not whole")
    label = int(label)
  if label.bit_length() > 3 * LONGEST:
    raise NoClass(f"longer than {LONGEST:,} characters")
  return None if label == -1 else str(label)


def classes_of(labels: Iterable[str], names: Sequence[str] = ()) -> Classes:
  """The classes of some labels.

  Args:
    labels: all that occur, as `text_of` gives them.
    names: of classes 0, 1, …, if the data come with a list. Labels are then numbers of these classes, or else names of
      them: numbers are taken for names where they are some and not all could be numbers.
  """
  labels = set(labels)
  wholes = {label: int(match[1]) for label in labels if (match := _WHOLE.fullmatch(label))}
  of_name = {name: number for number, name in reversed(list(enumerate(names)))}
  if len(wholes) < len(labels):
    if names and labels.isdisjoint(of_name) and not any(0 <= number < len(names) for number in wholes.values()):
      log.warning("the list of %d class names names none of the labels, such as %s: not used", len(names), min(labels))
      names = ()
    return _by_name(labels, names, of_name)
  if labels <= of_name.keys() and any(not 0 <= number < len(names) for number in wholes.values()):
    return _by_name(labels, names, of_name)
  others = sorted({number for number in wholes.values() if not 0 <= number < len(names)})
  of_number = {number: len(names) + i for i, number in enumerate(others)}
  numbers = {label: of_number.get(number, number) for label, number in wholes.items()}
  return Classes([*names, *map(str, others)], {str(number): number for number in range(len(names))} | numbers)


def class_names(path: str) -> list[str]:
  """The class names in `classes.json`, a list of names, or {number: name}, or {name: number}; none: no such file.

  Raises:
    ValueError: if it is something else; it says what to do.
  """
  if not storage.exists(path):
    return []
  way_out = "mend it, or delete it: classes are then called by their labels"
  try:
    return names_in(json.loads(storage.read(path)))
  except (OSError, BadImage) as error:
    raise ValueError(f"{path} cannot be read ({getattr(error, 'reason', error)}); {way_out}.") from error
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}, line {error.lineno}: is no whole JSON ({error.msg}); {way_out}.") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} holds no list of class names ({error}); {way_out}.") from error


def names_in(value: Any) -> list[str]:
  """The class names in a decoded JSON value; see `class_names`.

  Raises:
    ValueError: if it holds none.
  """
  if isinstance(value, dict) and value and all(isinstance(number, int) for number in value.values()):
    if len(set(value.values())) < len(value):
      raise ValueError("two names have one number")
    value = {str(number): name for name, number in value.items()}
  if isinstance(value, dict):
    if set(value) != set(map(str, range(len(value)))):
      raise ValueError("its numbers are not 0, 1, 2, …")
    value = [value[str(number)] for number in range(len(value))]
  if not isinstance(value, list):
    raise ValueError(f"a {type(value).__name__}, not a list")
  for entry in value:
    if not isinstance(entry, str | int):
      raise ValueError(f"an entry is a {type(entry).__name__}, not a name")
  return [shown_name(str(entry)) for entry in value]


def shown_name(name: str) -> str:
  """A class's name as it is compared and shown: macOS writes "é" as two characters, others as one."""
  return unicodedata.normalize("NFC", printable(name))


def ordered(names: Iterable[str]) -> list[str]:
  """Class names in the order in which classes are numbered: by number, if all are numbers."""
  numbers = all((match := _WHOLE.fullmatch(name)) and match[0] == match[1] for name in names)
  return sorted(names, key=int if numbers else None)


def _by_name(labels: set[str], names: Sequence[str], of_name: dict[str, int]) -> Classes:
  known = {label: of_name[label] for label in labels if names and label in of_name}
  for label in labels - known.keys():  # beside names there may be numbers of the same classes, as from another file
    if (match := _WHOLE.fullmatch(label)) and 0 <= int(match[1]) < len(names):
      known[label] = int(match[1])
  others = sorted(labels - known.keys())
  return Classes([*names, *others], known | {label: len(names) + i for i, label in enumerate(others)})


def label_caption(source: Any, label: int) -> str:
  """The class of an image of a source, by its name, for people."""
  return f"class {source.class_names[label]}" if label >= 0 else "no label"
