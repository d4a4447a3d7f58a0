"""What a source does not use, counted by reason: nothing of what lies in its folder or its shards vanishes unnamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_EXAMPLES = 20  # names that are kept of each reason; all are counted
_SHOWN = 3  # of those in a line
_IN_A_LINE = 6  # reasons
_REASONS = 50  # kept apart; what has a further reason is counted together
_OTHERS = "for other reasons"
_LONGEST = 200  # characters of a name in a message


class Reason(NamedTuple):
  """How much was left out for one reason.

  Attributes:
    count: files, members or records.
    examples: the names of the first few.
    expected: whether such things lie beside images as a rule, as captions do: no cause for a warning.
  """

  count: int
  examples: tuple[str, ...]
  expected: bool = False


class LeftOut(Mapping[str, Reason]):
  """{reason: how much, with examples}, the most frequent first."""

  def __init__(self, reasons: Mapping[str, Sequence[Any]] | None = None):
    """`reasons`: those of another, also as `to_json` gives them."""
    self._reasons = {
      reason: Reason(count, tuple(examples), expected)
      for reason, (count, examples, expected) in (reasons or {}).items()
    }

  def add(self, reason: str, name: str, count: int = 1, *, expected: bool = False) -> None:
    """Counts one more thing, or some, of which `name` is the first."""
    if reason not in self._reasons and len(self._reasons) >= _REASONS:
      reason, expected = _OTHERS, False
    before, examples, usual = self._reasons.get(reason, Reason(0, (), expected))
    if len(examples) < _EXAMPLES and (shown := _short(printable(name))) not in examples:
      examples = (*examples, shown)
    self._reasons[reason] = Reason(before + count, examples, usual and expected)

  def merge(self, other: Mapping[str, Reason]) -> None:
    """Counts all that another has counted, too."""
    for reason, (count, examples, expected) in other.items():
      if reason not in self._reasons and len(self._reasons) >= _REASONS:
        reason, expected = _OTHERS, False
      before, mine, usual = self._reasons.get(reason, Reason(0, (), expected))
      self._reasons[reason] = Reason(before + count, (*mine, *examples)[:_EXAMPLES], usual and expected)

  def __getitem__(self, reason: str) -> Reason:
    return self._reasons[reason]

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._reasons, key=lambda reason: -self._reasons[reason].count))

  def __len__(self) -> int:
    return len(self._reasons)

  def __repr__(self) -> str:
    return f"LeftOut({self.text()})"

  @property
  def total(self) -> int:
    """Things left out, for whatever reason."""
    return sum(reason.count for reason in self._reasons.values())

  @property
  def expected(self) -> bool:
    """Whether there is no cause for a warning."""
    return all(reason.expected for reason in self._reasons.values())

  def lines(self) -> list[str]:
    """Each reason in a line, as in "12 x .csv (a.csv, b.csv, c.csv, …)"."""
    return [_line(reason, self[reason]) for reason in self]

  def text(self) -> str:
    """The most frequent of them in one line; "nothing"."""
    lines = self.lines()
    if len(rest := list(self)[_IN_A_LINE:]) > 1:
      lines[_IN_A_LINE:] = [f"{sum(self[reason].count for reason in rest):,} for {len(rest)} other reasons"]
    return ", ".join(lines) or "nothing"

  def to_json(self) -> dict[str, list[Any]]:
    """What makes an equal one again."""
    return {reason: list(self[reason]) for reason in self}


def left_out_of(source: Any) -> LeftOut:
  """What a source leaves out; nothing, if it is of a kind that uses all that it is given."""
  return getattr(source, "left_out", None) or LeftOut()


def printable(name: str) -> str:
  """A name as it can be shown: escape sequences, line ends and bytes that are no text are written out."""
  return name if name.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in name)


def in_a_line(error: Exception) -> str:
  """What an error of another package says, in a line of moderate length."""
  return _short(printable(" ".join(str(error).split())) or type(error).__name__)


def _short(name: str) -> str:
  return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 :]}"


def _line(reason: str, found: Reason) -> str:
  more = ", …" if found.count > len(found.examples[:_SHOWN]) else ""
  return f"{found.count:,} x {reason} ({', '.join(found.examples[:_SHOWN])}{more})"
