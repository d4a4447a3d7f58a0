"""Reading JSON that anything may have happened to: one kind of error, with the file, the line and the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_SAID = 5  # damaged lines of a file that are named


class DamagedFile(ValueError):
  """A file is not what it should be; the message says which, where in it, and why.

  Attributes:
    path: the file.
    line: of the damage, from 1; None: nowhere in particular.
    reason: what is wrong.
  """

  def __init__(self, path: str | os.PathLike, reason: str, *, line: int | None = None, advice: str = ""):
    where = f"{path}, line {line}" if line is not None else f"{path}"
    super().__init__(f"{where}: {reason}{f'; {advice}' if advice else ''}")
    self.path, self.line, self.reason = Path(path), line, reason


def parse_json(
  content: str | bytes, path: str | os.PathLike, *, first_line: int = 1, kind: type | None = None, advice: str = ""
) -> Any:
  """A JSON value.

  Args:
    content: the text, or its bytes in UTF-8.
    path: where it is from, for the message.
    first_line: number of the first line of `content` in that file.
    kind: of the value, dict or list; None: any.
    advice: what to do about damage, for the end of the message.

  Raises:
    DamagedFile: if it is no text, no JSON, nested too deeply to be read, or of another kind.
  """
  try:
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    value = json.loads(text)
  except UnicodeDecodeError as error:
    line = first_line + error.object[: error.start].count(b"\n")
    raise DamagedFile(path, "holds bytes that are no text", line=line, advice=advice) from None
  except json.JSONDecodeError as error:
    if not text.strip():
      raise DamagedFile(path, "is empty", line=first_line, advice=advice) from None
    reason = f"is no JSON ({error.msg}, column {error.colno})"
    raise DamagedFile(path, reason, line=first_line + error.lineno - 1, advice=advice) from None
  except RecursionError:
    raise DamagedFile(path, "is nested too deeply to be read", line=first_line, advice=advice) from None
  except ValueError as error:  # a number of more digits than Python converts
    raise DamagedFile(path, f"cannot be read ({error})", line=first_line, advice=advice) from None
  if kind is not None and not isinstance(value, kind):
    names = {dict: "an object", list: "a list"}
    reason = f"must be {names.get(kind, kind.__name__)} of JSON, not {type(value).__name__}"
    raise DamagedFile(path, reason, line=first_line, advice=advice)
  return value


def read_json(path: str | os.PathLike, *, kind: type | None = None, advice: str = "") -> Any:
  """The JSON value that a file holds; see `parse_json`.

  Raises:
    FileNotFoundError: if there is none.
    DamagedFile: if it cannot be read, is no regular file, or is no such JSON.
  """
  return parse_json(_content(Path(path), advice), path, kind=kind, advice=advice)


class Lines(NamedTuple):
  """What `read_json_lines` found.

  Attributes:
    good: the lines as they are and their values.
    bad: what is wrong with each of the others.
    torn: what is wrong with the last line, if it is the only one at the end that cannot be read, as a kill or a power
      cut leaves it; or None.
  """

  good: list[tuple[bytes, Any]]
  bad: list[DamagedFile]
  torn: DamagedFile | None

  def problems(self) -> list[str]:
    """The bad lines in words: the first few, and how many more there are."""
    said = [str(error) for error in self.bad[:_SAID]]
    if len(self.bad) > _SAID:
      said.append(f"{self.bad[0].path}: {len(self.bad) - _SAID} more lines cannot be read")
    return said


def read_json_lines(path: str | os.PathLike, check: Callable[[Any], str | None] = lambda value: None) -> Lines:
  """A file of one JSON value a line.

  Args:
    path: the file.
    check: says of a value what is wrong with it; None: nothing.

  Raises:
    FileNotFoundError: if there is none.
    DamagedFile: if the file as a whole cannot be read.
  """
  good, bad, since = [], [], []  # since: the last good line
  for number, raw in enumerate(_content(Path(path), "").splitlines(keepends=True), start=1):
    try:
      value = parse_json(raw, path, first_line=number)
      problem = check(value) if raw.endswith(b"\n") else "ends without a newline"
      if problem is not None:
        raise DamagedFile(path, problem, line=number)
    except DamagedFile as error:
      since.append(error)
    else:
      good.append((raw, value))
      bad += since
      since = []
  torn = since.pop() if len(since) == 1 else None  # damage of more lines is none of a kill
  return Lines(good, bad + since, torn)


def _content(path: Path, advice: str) -> bytes:
  try:
    if path.exists() and not path.is_file():
      raise DamagedFile(path, "is no file", advice=advice)
    return path.read_bytes()
  except FileNotFoundError:
    raise
  except OSError as error:
    raise DamagedFile(path, f"cannot be read ({error.strerror or error})", advice=advice) from error
