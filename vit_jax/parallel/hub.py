"""Process 0's side of the lifelines: a thread that hears all processes and tells them what concerns all.

Until the job is complete strangers reach it, too. They get a few seconds, a few places and a few bytes to prove that
they know the job's secret; whatever they do concerns their own connection and no other. It never waits for one
connection: what a process does not take at once is kept, up to a bound. What goes wrong in the thread itself ends the
job with the reason, as a job without it could neither be stopped nor notice that a process is gone.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sized
from typing import Any

from vit_jax.parallel import addresses, ending, wire
from vit_jax.parallel.ending import FAILED, JoinError

log = logging.getLogger(__name__)

ENDED = "ended without a word: killed (out of memory?), or its machine went away"
_TICK = 0.1
_PROOF_TIME = 5.0  # seconds that a connection has to prove itself and to say which process it is
_STRANGERS = 128  # connections that may be about it at a time, or one for each process of a larger job
_UNSENT = 1 << 20  # bytes that are kept for a process that does not read
_TOPICS = 64  # of which the processes may be speaking at a time
_FAREWELL = 2.0  # seconds that the others have to take the last words


class _Peer:
  """A connection, and whose it is as far as that is known."""

  def __init__(self, connection: socket.socket, address: str):
    self.connection, self.address = connection, address
    self.challenge = wire.challenge()
    self.proof = b""
    self.session: wire.Session | None = None  # once proven
    self.number: int | None = None  # once it has said which process it is
    self.unsent = bytearray()
    self.deadline = time.monotonic() + _PROOF_TIME


class Hub:
  """Listens, and works until the process ends.

  Args:
    host: of the coordinator's address.
    port: of it.
    count: of all processes.
    secret: of the job; empty for a job that anybody may join.
    timeout: seconds for all to come.
    prepare: what everyone said of itself, in order -> what each is told. Besides its "about", everyone has "host",
      "pid" and "reached", the address of this machine at which it came.

  Raises:
    JoinError: if it cannot listen there.
  """

  def __init__(self, host: str, port: int, count: int, *, secret: bytes, timeout: float, prepare: Callable):
    self._count, self._secret, self._timeout, self._prepare = count, secret, timeout, prepare
    self._address = addresses.join(host, port)
    self._places = max(_STRANGERS, count)
    self._listeners = addresses.listen(host, port, backlog=self._places)
    self._deadline = time.monotonic() + timeout
    self._selector = selectors.DefaultSelector()
    self._peers: dict[_Peer, None] = {}  # all of them
    self._unknown: dict[_Peer, None] = {}  # those that have not said who they are, in the order in which they came
    self._hello: dict[int, dict[str, Any]] = {}
    self._left: set[int] = set()
    self._rounds: dict[str, dict[int, int]] = {}
    self._claims: dict[str, dict[int, str]] = {}
    self._strangers: Counter[str] = Counter()
    self._begun = self._over = False
    self._refusal = ""  # why the job cannot begin
    self._refused: list[_Peer] = []  # who is told besides the processes
    host, port = self._listeners[0].getsockname()[:2]
    self.own_address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # where process 0 itself comes
    for listener in self._listeners:
      self._selector.register(listener, selectors.EVENT_READ)
    threading.Thread(target=self._run, daemon=True, name="lifeline-hub").start()

  def _run(self) -> None:
    try:
      while not self._over:
        self._turn()
    except Exception as error:
      name = f"process 0 of {self._count}"
      text = f"the thread that watches over the processes failed: {type(error).__name__}: {error}"
      try:
        ending.say(name, text)
        self._tell("failed", text=f"{name}: {text}", process=-1, code=FAILED)
      finally:
        ending.end(FAILED)

  def _turn(self) -> None:
    for key, events in self._selector.select(_TICK):
      if key.data is None:
        self._accept(key.fileobj)
      elif key.data in self._peers:  # not closed in this same turn
        self._attend(key.data, events)
    now = time.monotonic()
    while self._unknown and now > (oldest := next(iter(self._unknown))).deadline:
      self._dismiss(oldest, f"did not prove themselves within {_PROOF_TIME:.0f} s")
    if self._begun:
      return
    if not self._refusal and len(self._hello) == self._count:
      self._begin()
    elif not self._refusal and now > self._deadline:
      self._refuse(self._who_is_missing())
    if self._refusal and (0 in self._hello or now > self._deadline):  # process 0 must hear of it
      self._end_roll_call()

  # Strangers.

  def _accept(self, listener: socket.socket) -> None:
    if len(self._unknown) >= self._places:
      self._make_room()
    try:
      connection, address = listener.accept()
    except BlockingIOError:
      return
    except OSError as error:  # mostly as no file descriptor is left
      self._strangers[f"could not be accepted ({error.strerror})"] += 1
      if not self._unknown:
        time.sleep(_TICK)  # the listener stays readable
      for _ in range(1 + len(self._unknown) // 2):
        self._make_room()
      return
    peer = _Peer(connection, wire.name(str(address[0])))
    try:
      connection.setblocking(False)
      addresses.keep_alive(connection)
      self._selector.register(connection, selectors.EVENT_READ, peer)
    except OSError:  # gone already
      connection.close()
      return
    self._peers[peer] = self._unknown[peer] = None
    self._send(peer, peer.challenge)

  def _make_room(self) -> None:
    """Closes the oldest connection that has proven nothing; or a proven one if there are no others."""
    if self._unknown:
      oldest = next(iter(self._unknown))
      self._dismiss(next((p for p in self._unknown if not p.session), oldest), "had to make room for others")

  def _examine(self, peer: _Peer) -> None:
    """Looks at the proof, before anything else of a connection is read."""
    answer = wire.answer(self._secret, peer.challenge, peer.proof)
    if answer is not None:
      peer.session = wire.Session(self._secret, peer.challenge, peer.proof, first=True, count=self._count)
      self._send(peer, answer)
      return
    why = "did not know the job's secret"
    if not self._strangers[why]:
      log.warning("A connection from %s %s: a stranger, or a process with another secret.", peer.address, why)
    self._send(peer, wire.WRONG)
    self._dismiss(peer, why)

  def _dismiss(self, peer: _Peer, why: str) -> None:
    self._close(peer)
    self._strangers[why] += 1

  def _of_strangers(self) -> str:
    return "; ".join(f"{number} {why}" for why, number in self._strangers.items())

  # Any connection.

  def _attend(self, peer: _Peer, events: int) -> None:
    """Whatever comes over one connection ends that one, and the job only if it is a process's."""
    try:
      if events & selectors.EVENT_WRITE:
        self._flush(peer)
      if events & selectors.EVENT_READ:
        self._receive(peer)
    except (OSError, EOFError):
      self._lose(peer, ENDED, again=True)
    except wire.WireError as error:
      self._lose(peer, f"sent {error}: it runs another version, or memory or the network is damaged")
    except Exception as error:  # RecursionError, MemoryError, and what nobody has thought of
      self._lose(peer, f"sent what cannot be read ({type(error).__name__}: {error})")

  def _receive(self, peer: _Peer) -> None:
    data = peer.connection.recv(1 << 16 if peer.session else wire.PROOF_SIZE - len(peer.proof))
    if not data:
      raise EOFError
    if peer.session is None:
      peer.proof += data
      if not wire.begins(peer.proof):
        self._dismiss(peer, "spoke another language")
      elif len(peer.proof) == wire.PROOF_SIZE:
        self._examine(peer)
      return
    for message in peer.session.unpack(data):
      if peer not in self._peers or self._over:
        return
      if peer.number is None:
        self._greet(peer, message)
      else:
        self._take(peer.number, message)

  def _lose(self, peer: _Peer, why: str, *, again: bool = False) -> None:
    """A connection has ended, or must: a stranger's, or a process's, which until the job begins may come `again`."""
    number = peer.number
    if number is None:
      self._dismiss(peer, "ended before they had proven themselves" if again else "said what no process says")
      return
    self._close(peer)
    if self._over:
      return
    if self._begun:
      if number not in self._left:
        self._left.add(number)
        self._fail(number, why, FAILED)
    elif again:
      del self._hello[number]
    else:
      self._refuse(f"{self._name(number)} {why}")

  def _close(self, peer: _Peer) -> None:
    self._unknown.pop(peer, None)
    if peer in self._peers:
      del self._peers[peer]
      self._selector.unregister(peer.connection)
      peer.connection.close()

  def _send(self, peer: _Peer, data: bytes) -> None:
    if peer not in self._peers:
      return
    peer.unsent += data
    self._try_flush(peer)
    if len(peer.unsent) > _UNSENT + wire.PER_PROCESS * self._count:
      self._lose(peer, "does not read what it is told: it hangs, or was stopped")

  def _try_flush(self, peer: _Peer) -> None:
    with contextlib.suppress(OSError):  # of a connection that is broken, found out when it is read
      self._flush(peer)

  def _flush(self, peer: _Peer) -> None:
    """Sends what the connection takes now."""
    try:
      while peer.unsent:
        del peer.unsent[: peer.connection.send(peer.unsent)]
    except BlockingIOError:
      pass
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
    if self._selector.get_key(peer.connection).events != events:
      self._selector.modify(peer.connection, events, peer)

  def _drain(self, peers: Iterable[_Peer]) -> None:
    """Gives these the time to take what they are told last."""
    until = time.monotonic() + _FAREWELL
    while (waiting := [p for p in peers if p.unsent and p in self._peers]) and time.monotonic() < until:
      time.sleep(_TICK / 10)
      for peer in waiting:
        self._try_flush(peer)

  # The roll call.

  def _greet(self, peer: _Peer, message: wire.Message) -> None:
    if message.kind != "hello":
      raise wire.WireError(f"a message {message.kind!r} before it said who it is")
    hello = message.fields
    number, host, pid = hello["process"], wire.name(hello["host"]), hello["pid"]
    other = self._hello.get(number)
    if hello["of"] != self._count or not 0 <= number < self._count:
      self._refuse(
        f"process {number} ({host}) was started as one of {hello['of']}, process 0 as one of {self._count}: "
        "--num_processes must be the same for all.",
        peer,
      )
    elif other is not None:
      self._refuse(
        f"process_id {number} was given to {other['host']} (pid {other['pid']}) and to {host} (pid {pid}): every "
        "process needs its own.",
        peer,
      )
    else:
      reached = peer.connection.getsockname()[0]
      peer.number = number
      del self._unknown[peer]
      self._hello[number] = hello["about"] | {"host": host, "pid": pid, "reached": reached}

  def _begin(self) -> None:
    try:
      answers = self._prepare([self._hello[i] for i in range(self._count)])
    except JoinError as error:
      self._refuse(str(error))
      return
    self._begun = True
    self._close_door()
    hosts = [self._hello[i]["host"] for i in range(self._count)]
    for peer in self._processes():
      self._send(peer, peer.session.pack("welcome", hosts=hosts, about=answers[peer.number]))

  def _close_door(self) -> None:
    """Nobody can come any more."""
    for listener in self._listeners:
      self._selector.unregister(listener)
      listener.close()
    for peer in list(self._unknown):
      self._close(peer)
    if self._strangers:
      log.warning("Connections to %s that were none of the job's: %s.", self._address, self._of_strangers())

  def _who_is_missing(self) -> str:
    missing = ending.ranges(set(range(self._count)) - set(self._hello))
    return (
      f"only {len(self._hello)} of {self._count} processes came to the coordinator {self._address} within "
      f"{self._timeout:.0f} s. Missing: process {missing}. See what they print; or give more time with "
      f"--join_timeout=SECONDS.{f' Of other connections {self._of_strangers()}.' if self._strangers else ''}"
    )

  def _refuse(self, text: str, *more: _Peer) -> None:
    """The job cannot begin, which all are to hear, and `more` that are none of its processes."""
    self._refusal = self._refusal or text
    self._refused += more

  def _end_roll_call(self) -> None:
    self._over = True
    for listener in self._listeners:
      listener.close()
    self._say_last([*self._refused, *self._processes()], "refused", text=self._refusal)

  # The job.

  def _processes(self) -> list[_Peer]:
    """Process 0 last: when it is told that the job is over it ends, and with it this thread."""
    return sorted((p for p in self._peers if p.number is not None), key=lambda p: -p.number)

  def _take(self, number: int, message: wire.Message) -> None:
    kind, fields = message
    if kind == "ask":
      self._ask(fields["what"])
    elif kind == "at":
      self._arrange(fields["what"], number, fields["step"])
    elif kind == "claim":
      self._compare(fields["what"], number, fields["value"])
    elif kind == "failure":
      self._left.add(number)
      self._fail(number, f"failed: {fields['text']}", fields["code"])
    elif kind == "bye":
      self._left.add(number)
    else:
      raise wire.WireError(f"a message {kind!r}, which is not for it to send")

  def _ask(self, what: str) -> None:
    if what not in self._rounds:
      _bound(self._rounds)
      self._rounds[what] = {}
      self._tell("where", what=what)

  def _arrange(self, what: str, number: int, step: int) -> None:
    found = self._rounds.get(what)
    if found is None or number in found:
      raise wire.WireError("an answer that nobody asked for")
    found[number] = step
    if len(found) == self._count:
      del self._rounds[what]
      self._tell("do", what=what, step=max(found.values()) + 1)

  def _compare(self, what: str, number: int, value: str) -> None:
    if what not in self._claims:
      _bound(self._claims)
      self._claims[what] = {}
    claims = self._claims[what]
    claims[number] = value
    if len(claims) < self._count:
      return
    del self._claims[what]
    if len(set(claims.values())) == 1:
      self._tell("same", what=what)
      return
    said = defaultdict(set)
    for process, claim in claims.items():
      said[wire.printable(claim, 1000)].add(process)
    listed = [f"  {claim}: process {ending.ranges(who)}" for claim, who in said.items()]
    if len(listed) > 8:
      listed[8:] = [f"  and {len(listed) - 8} others"]
    text = "\n".join([f"{wire.printable(what, 1000)} differs between the processes:", *listed])
    self._tell("failed", text=text, process=-1, code=FAILED)

  def _name(self, number: int) -> str:
    who = self._hello[number]
    return f"process {number} of {self._count} ({who['host']}, pid {who['pid']})"

  def _fail(self, number: int, text: str, code: int) -> None:
    self._tell("failed", text=f"{self._name(number)} {text}", process=number, code=code)

  def _tell(self, kind: str, **fields: Any) -> None:
    if kind == "failed":
      self._say_last(self._processes(), kind, **fields)
      return
    for peer in self._processes():
      self._send(peer, peer.session.pack(kind, **fields))

  def _say_last(self, peers: Iterable[_Peer], kind: str, **fields: Any) -> None:
    """Says something after which a process ends: process 0 hears it when the others have taken it."""
    fields["text"] = wire.printable(fields["text"])
    told = []
    for peer in peers:
      if peer.number == 0:
        self._drain(told)
      self._send(peer, peer.session.pack(kind, **fields))
      told.append(peer)
    self._drain(told)


def _bound(topics: Sized) -> None:
  if len(topics) >= _TOPICS:
    raise wire.WireError(f"messages about more than {_TOPICS} things at a time")
