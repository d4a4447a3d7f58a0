"""What the processes of a job say to each other, and how each knows that a process of the job says it.

A connection opens with a proof of the job's secret, of a fixed number of bytes, so that nothing a stranger sends is
ever parsed: process 0 sends random bytes, the other answers with random bytes of its own and a code (HMAC-SHA256) over
both, process 0 with another code. The secret itself never travels, and what was said on one connection proves nothing
on the next. Messages follow: each is a length, a code over its place in the conversation and its content, and the
content, a small piece of JSON. Nobody can add, change, repeat, reorder or redirect one. They are not encrypted.

Nothing here touches a socket.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

LIMIT = 1 << 18  # bytes of a message
PER_PROCESS = 2048  # bytes more, for each process of the job, of a message that tells of all of them
TEXT = 20_000  # characters of what is said to people
NAME = 255  # characters of a machine's name
_MAGIC = b"vit_jax2"
_NONCE = 32
_CODE = 32
_HEADER = struct.Struct(f">I{_CODE}s")
_DEPTH = 4  # of lists and objects within each other
_INTEGERS = range(-(2**63), 2**63)

CHALLENGE_SIZE = len(_MAGIC) + _NONCE
PROOF_SIZE = CHALLENGE_SIZE + _CODE
ANSWER_SIZE = _CODE
WRONG = bytes(ANSWER_SIZE)  # the answer to a proof that does not hold

# The fields of every kind of message, and their types.
KINDS: Mapping[str, Mapping[str, type]] = {
  # to process 0
  "hello": {"process": int, "of": int, "host": str, "pid": int, "about": dict},
  "ask": {"what": str},
  "at": {"what": str, "step": int},
  "claim": {"what": str, "value": str},
  "failure": {"text": str, "code": int},
  "bye": {},
  # from process 0
  "welcome": {"hosts": list, "about": dict},
  "refused": {"text": str},
  "where": {"what": str},
  "do": {"what": str, "step": int},
  "same": {"what": str},
  "failed": {"text": str, "process": int, "code": int},
}


class WireError(RuntimeError):
  """What came over a connection cannot be a message of a process of this job."""


class Message(NamedTuple):
  kind: str
  fields: Mapping[str, Any]


def challenge() -> bytes:
  """What process 0 opens a connection with: never the same twice."""
  return _MAGIC + secrets.token_bytes(_NONCE)


def prove(secret: bytes, challenge: bytes) -> bytes:
  """What answers a challenge."""
  said = _MAGIC + secrets.token_bytes(_NONCE)
  return said + _code(secret, b"proof", challenge + said)


def answer(secret: bytes, challenge: bytes, proof: bytes) -> bytes | None:
  """Process 0's own proof, in return for one that holds; None for one that does not."""
  said, code = proof[:-_CODE], proof[-_CODE:]
  if not hmac.compare_digest(_code(secret, b"proof", challenge + said), code):
    return None
  return _code(secret, b"answer", challenge + said)


def convinces(secret: bytes, challenge: bytes, proof: bytes, answer: bytes) -> bool:
  """Whether the answer to one's own proof comes from process 0, too."""
  return hmac.compare_digest(_code(secret, b"answer", challenge + proof[:-_CODE]), answer)


def begins(data: bytes) -> bool:
  """Whether a challenge or a proof may begin so: what speaks another language need not be waited for."""
  return _MAGIC.startswith(data[: len(_MAGIC)])


class Session:
  """The messages of one connection after the proof.

  Args:
    secret: of the job.
    challenge: that opened the connection.
    proof: that answered it.
    first: whether this is the side of process 0.
    count: of all processes, of which process 0 has more to say than the others.
  """

  def __init__(self, secret: bytes, challenge: bytes, proof: bytes, *, first: bool, count: int):
    key = _code(secret, b"session", challenge + proof[:-_CODE])
    self._out, self._in = (_code(key, way, b"") for way in ((b"down", b"up") if first else (b"up", b"down")))
    self._sent = self._taken = 0
    down, up = LIMIT + PER_PROCESS * count, LIMIT
    self._longest, self._limit = (down, up) if first else (up, down)
    self._buffer = bytearray()

  def pack(self, kind: str, **fields: Any) -> bytes:
    """The bytes of a message. They must be sent in the order in which they were made.

    Raises:
      WireError: if it is too long.
    """
    content = json.dumps([kind, fields], separators=(",", ":")).encode()
    if len(content) > self._longest:
      raise WireError(f"a message {kind!r} of {len(content)} bytes, where {self._longest} are the most")
    return self._seal(content)

  def _seal(self, content: bytes) -> bytes:
    self._sent += 1
    return _HEADER.pack(len(content), _code(self._out, struct.pack(">Q", self._sent), content)) + content

  def unpack(self, data: bytes) -> Iterator[Message]:
    """The messages that these bytes complete.

    Raises:
      WireError: at the first one that is too long, is not the other side's or makes no sense.
    """
    self._buffer += data
    while len(self._buffer) >= _HEADER.size:
      length, code = _HEADER.unpack_from(self._buffer)
      if length > self._limit:
        raise WireError(f"a message of {length} bytes, where {self._limit} are the most")
      end = _HEADER.size + length
      if len(self._buffer) < end:
        return
      content = bytes(self._buffer[_HEADER.size : end])
      self._taken += 1
      if not hmac.compare_digest(_code(self._in, struct.pack(">Q", self._taken), content), code):
        raise WireError("a message that is damaged, or not of this job")
      del self._buffer[:end]
      yield _parse(content)


def _code(key: bytes, purpose: bytes, content: bytes) -> bytes:
  return hmac.digest(key, purpose + b"\0" + content, "sha256")


def _parse(content: bytes) -> Message:
  """Checks a message's depth before it is read, and its kind and the types of its fields after."""
  if _depth(content) > _DEPTH:
    raise WireError(f"a message with more than {_DEPTH} lists and objects within each other")
  try:
    match json.loads(content):
      case [str(kind), dict(fields)] if kind in KINDS:
        pass
      case _:
        raise WireError("a message of no known kind")
  except ValueError as error:  # of JSON and of UTF-8
    raise WireError(f"a message that cannot be read: {error}") from error
  expected = KINDS[kind]
  for name in sorted(expected.keys() | fields.keys()):
    value = fields.get(name)
    if name not in fields or name not in expected or type(value) is not expected[name]:
      raise WireError(f"a message {kind!r} whose {printable(name, 40)!r} is {type(value).__name__}")
    if isinstance(value, int) and value not in _INTEGERS:
      raise WireError(f"a message {kind!r} whose {name!r} is a number beyond all bounds")
  return Message(kind, fields)


def _depth(content: bytes) -> int:
  deepest = depth = 0
  for bracket in re.findall(rb"[\[\]{}]", re.sub(rb'"(?:[^"\\]|\\.)*"?', b"", content)):
    depth += 1 if bracket in b"[{" else -1
    deepest = max(deepest, depth)
  return deepest


def printable(text: str, limit: int = TEXT) -> str:
  """What may be shown of a text that came from elsewhere: of bounded length, without control characters.

  Line ends stay; what else a terminal would obey (escape sequences, changes of direction) becomes a replacement
  character.
  """
  shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])
  return shown if len(text) <= limit else f"{shown} … ({len(text) - limit} characters more)"


def name(text: str) -> str:
  """A machine's name as it may be shown, on one line."""
  return printable(text, NAME).replace("\n", "\N{REPLACEMENT CHARACTER}")
