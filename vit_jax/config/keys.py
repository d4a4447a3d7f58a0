"""One definition of a config key: its default, its type, which values are right, what it means, whose it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
  """What is right of a value.

  Attributes:
    text: in words, to follow "key=value: ".
    test: of a value that has the right type.
  """

  text: str
  test: Callable[[Any], bool]


AT_LEAST_1 = Rule("must be at least 1", lambda v: v >= 1)
AT_LEAST_2 = Rule("must be at least 2", lambda v: v >= 2)
POSITIVE = Rule("must be more than 0", lambda v: v > 0)
NOT_NEGATIVE = Rule("must not be negative", lambda v: v >= 0)
PROBABILITY = Rule("must be from 0 to 1", lambda v: 0 <= v <= 1)
BELOW_1 = Rule("must be at least 0 and less than 1", lambda v: 0 <= v < 1)
FACTOR = Rule("must be more than 0 and at most 1", lambda v: 0 < v <= 1)
RANGE_IN_0_1 = Rule("must be (low, high) with 0 <= low <= high <= 1", lambda v: 0 <= v[0] <= v[1] <= 1)
SHARE_RANGE = Rule("must be (low, high) with 0 < low <= high <= 1", lambda v: 0 < v[0] <= v[1] <= 1)
POSITIVE_RANGE = Rule("must be (low, high) with 0 < low <= high", lambda v: 0 < v[0] <= v[1])

_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class Key:
  """A key of the configuration.

  Attributes:
    default: its value unless something else is said; None: the key may stay empty.
    meaning: for people: what it does, what values mean, what None means.
    rule: of the value; of a tuple, of every element.
    whole: of a tuple as a whole.
    choices: the only values (of a tuple: elements).
    kind: int, float, bool, str or tuple; None: that of the default.
    element: of a tuple whose default does not show it; a tuple of types: its elements are rows of these.
    length: of a tuple; None: that of the default, or any where that has no elements or is text.
    duration: for durations: "some" (more than nothing) or "any".
    of_run: for durations: whether "10 %" of the run has a meaning.
    own: whether each of several models that a run trains has its own value.
  """

  default: Any
  meaning: str
  rule: Rule | None = None
  _: dataclasses.KW_ONLY
  whole: Rule | None = None
  choices: tuple[Any, ...] = ()
  kind: type | None = None
  element: type | tuple[type, ...] | None = None
  length: int | None = None
  duration: str | None = None
  of_run: bool = True
  own: bool = False

  def __post_init__(self) -> None:
    if self.kind is None:
      if self.default is None:
        raise TypeError(f"{self.meaning!r}: a key whose default is None must say its kind")
      object.__setattr__(self, "kind", type(self.default))
    if self.kind is tuple and self.element is None:
      object.__setattr__(self, "element", type(self.default[0]))
      if self.element is not str and self.length is None:
        object.__setattr__(self, "length", len(self.default))

  @property
  def optional(self) -> bool:
    """Whether None is a value."""
    return self.default is None

  @property
  def right(self) -> str:
    """Its type, for people, to follow "must be "."""
    if self.kind is not tuple:
      text = _NAMES[self.kind]
    elif isinstance(self.element, tuple):
      row = f"({','.join('0.5' if kind is float else '96' for kind in self.element)})"
      text = f"rows of {len(self.element)} numbers such as ({row},{row})"
    elif self.length is None and self.element is not str:
      text = f"numbers such as ({'0.5' if self.element is float else '2'},)"
    elif self.length is None:
      text = 'names such as "(knn,linear)"'
    else:
      text = f"{self.length} numbers such as ({','.join(['0.5'] * self.length)})"
    return text + (" or None" if self.optional else "")


Section = Mapping[str, "Key | Section"]


def owned(section: Section, *, but: tuple[str, ...] = ()) -> dict[str, Any]:
  """The same section with keys that each of several models has for itself.

  Args:
    section: keys and sections by name.
    but: dotted keys, or sections, that all models share.
  """

  def mark(inner: Section, prefix: str) -> dict[str, Any]:
    found = {}
    for name, key in inner.items():
      path = prefix + name
      if path in but:
        found[name] = key
      else:
        found[name] = dataclasses.replace(key, own=True) if isinstance(key, Key) else mark(key, f"{path}.")
    return found

  return mark(section, "")
