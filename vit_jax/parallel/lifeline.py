"""One connection from every process to process 0, from the roll call before the job begins to its end.

Over it the processes find each other, agree on things, and learn at once when one of them fails: a connection that
ends without a farewell is a process that was killed. The coordinator's address is that of the lifeline.

JAX's own coordination service can take over none of this. It asks for no proof, so that what it says may be anybody's;
it notices a killed process after 100 seconds; and its only answer is to abort, with words that are not for users.
It starts when all have met, where the roll call says.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from vit_jax.parallel import addresses, ending, wire
from vit_jax.parallel.ending import FAILED, JoinError
from vit_jax.parallel.hub import ENDED, Hub

_TICK = 0.1
_PROOF_TIME = 10.0  # seconds in which process 0 answers a connection


class Lifeline:
  """This process's end of the connection.

  Args:
    channel: to process 0, after the roll call.
    process: this one's number.
    count: of all.
    host: name of this machine.
    hosts: names of everybody's.
    about: what else the roll call said.
  """

  def __init__(
    self, channel: Channel, process: int, count: int, *, host: str, hosts: list[str], about: Mapping[str, Any]
  ):
    self.process, self.count, self.host = process, count, host
    self.hosts, self.about = hosts, about
    self._channel = channel
    self._left = False
    self._failing = False  # for a reason of its own, which the end of the others follows
    self._asked: set[str] = set()
    self._agreements: defaultdict[str, _Agreed] = defaultdict(_Agreed)
    self._same: defaultdict[str, threading.Event] = defaultdict(threading.Event)
    self._meetings = 0
    threading.Thread(target=self._listen, daemon=True, name="lifeline").start()

  @property
  def name(self) -> str:
    return f"process {self.process} of {self.count} ({self.host})"

  def ask(self, what: str) -> None:
    """Asks all processes to agree on a step for something; does nothing but take note, for signal handlers."""
    self._asked.add(what)

  def due(self, what: str, step: int) -> bool:
    """Whether this step is the one agreed on. To be called by all processes, for every step in turn."""
    return self._agreements[what].reach(step)

  def check_same(self, what: str, value: str) -> None:
    """Returns when every process has said the same; otherwise the job fails, naming who said what."""
    self._channel.send("claim", what=what, value=value)
    self._same[what].wait()

  def meet(self, what: str) -> None:
    """Returns when every process is here, all for the same; otherwise the job fails."""
    self._meetings += 1
    self.check_same(f"meeting {self._meetings}", what)

  def agreed(self, what: str) -> bool:
    """Whether there was ever a step agreed on for this."""
    return self._agreements[what].ever

  def fail(self, text: str, code: int, *, others: int = FAILED, wait: float = 0.0) -> NoReturn:
    """Ends the job with the reason.

    Args:
      text: what is wrong.
      code: exit code of this process.
      others: exit code of the others.
      wait: seconds in which news of another's failure comes first: then this one is only its consequence.
    """
    time.sleep(wait)
    self._left = self._failing = True
    try:
      ending.say(self.name, text)
      self._channel.send("failure", text=wire.printable(text), code=others)
      if self.process == 0:
        time.sleep(1.0)  # the others hear of it through this process
    finally:
      ending.end(code)

  def leave(self) -> None:
    """Says that this process ends as it should."""
    self._left = True
    with contextlib.suppress(OSError):  # of a connection that is broken, which the listener has found out
      self._channel.send("bye")

  def _listen(self) -> None:
    """What goes wrong here ends the process, and with it the job: nobody would hear of anything any more."""
    try:
      with contextlib.suppress(ConnectionError, TimeoutError):
        for message in self._channel.messages(self._pass_on):
          self._take(message)
    except Exception as error:
      if not self._left:
        self.fail(f"the connection to process 0 failed: {type(error).__name__}: {error}", FAILED)
    if not self._left:
      try:
        ending.say(self.name, f"stopping: process 0 of {self.count} ({self.hosts[0]}) {ENDED}")
      finally:
        ending.end(FAILED)

  def _pass_on(self) -> None:
    for what in sorted(self._asked):
      self._asked.discard(what)
      self._channel.send("ask", what=what)

  def _take(self, message: wire.Message) -> None:
    kind, fields = message
    if kind == "where":
      self._channel.send("at", what=fields["what"], step=self._agreements[fields["what"]].pause())
    elif kind == "do":
      self._agreements[fields["what"]].go_on(fields["step"])
    elif kind == "same":
      self._same[fields["what"]].set()
    elif kind != "failed":
      raise wire.WireError(f"a message {kind!r} in the midst of the job")
    elif fields["process"] != self.process and not self._failing:
      try:
        ending.say(self.name, f"stopping: {fields['text']}")
      finally:
        ending.end(fields["code"])


class _Agreed:
  """What one process knows of an agreement: how far it is, and from which steps on all act."""

  def __init__(self) -> None:
    self.ever = False  # agreed on anything
    self._lock = threading.Lock()  # held by the listener while the processes compare how far they are
    self._paused = False
    self._step = self._acted = -1
    self._ahead: list[int] = []

  def reach(self, step: int) -> bool:
    """Whether to act at this step: the first from an agreed one on, which it is not if none had begun to count."""
    with self._lock:
      self._step = step
      left = [agreed for agreed in self._ahead if agreed > step]
      if left != self._ahead:
        self._ahead, self._acted = left, step
      return step == self._acted

  def pause(self) -> int:
    """The step of this process, beyond which it does not go until all have said where they are."""
    if self._paused:
      raise wire.WireError("a second question while the first is open")
    self._lock.acquire()
    self._paused = True
    return self._step

  def go_on(self, step: int) -> None:
    if not self._paused:
      raise wire.WireError("an agreement that nobody asked for")
    self._ahead.append(step)
    self.ever = True
    self._paused = False
    self._lock.release()


class Channel:
  """A connection to process 0 on which both sides have proven that they know the job's secret.

  Args:
    host: where process 0 is.
    port: of it.
    secret: of the job.
    count: of all processes.
    until: when, by the monotonic clock, this may be given up.

  Raises:
    OSError: if there is no connection, or none to process 0.
    JoinError: if process 0 has another secret.
  """

  def __init__(self, host: str, port: int, *, secret: bytes, count: int, until: float):
    patience = max(0.1, min(_PROOF_TIME, until - time.monotonic()))
    self._connection = socket.create_connection((host, port), timeout=patience)
    try:
      self._session = self._prove(secret, count, time.monotonic() + patience)
      addresses.keep_alive(self._connection)
      self._connection.settimeout(addresses.SILENCE)
    except BaseException:
      self._connection.close()
      raise
    self._sending = threading.Lock()

  def _prove(self, secret: bytes, count: int, until: float) -> wire.Session:
    challenge = self._exactly(wire.CHALLENGE_SIZE, until)
    if not wire.begins(challenge):
      raise OSError("what answers there is no coordinator of vit_jax, or of another version")
    proof = wire.prove(secret, challenge)
    self._connection.sendall(proof)
    answer = self._exactly(wire.ANSWER_SIZE, until)
    if answer == wire.WRONG:
      raise JoinError("process 0 has another secret: VIT_JAX_JOB_SECRET must be the same for all, or set for none.")
    if not wire.convinces(secret, challenge, proof, answer):
      raise OSError("what answers there does not know the job's secret (VIT_JAX_JOB_SECRET)")
    return wire.Session(secret, challenge, proof, first=False, count=count)

  def _exactly(self, size: int, until: float) -> bytes:
    data = b""
    while len(data) < size:
      self._connection.settimeout(max(0.01, until - time.monotonic()))
      more = self._connection.recv(size - len(data))
      if not more:
        raise ConnectionError("the coordinator closed the connection")
      data += more
    return data

  def send(self, kind: str, **fields: Any) -> None:
    """Sends a message.

    Raises:
      OSError: if the connection is broken, or process 0 does not read.
      wire.WireError: if it is too long.
    """
    with self._sending:
      self._connection.sendall(self._session.pack(kind, **fields))

  def messages(self, idle: Callable[[], None] = lambda: None, until: float = float("inf")) -> Iterator[wire.Message]:
    """The messages of process 0 until the connection ends, or the time; `idle` is called now and then.

    Raises:
      OSError: if the connection is broken.
      wire.WireError: if what comes is no message of process 0.
    """
    with selectors.DefaultSelector() as selector:
      selector.register(self._connection, selectors.EVENT_READ)
      yield from self._session.unpack(b"")  # what came together with the last one that was taken
      while time.monotonic() < until:
        idle()
        if not selector.select(_TICK):
          continue
        data = self._connection.recv(1 << 16)
        if not data:
          return
        yield from self._session.unpack(data)


def join(
  address: str,
  process: int,
  count: int,
  *,
  timeout: float,
  host: str,
  about: Mapping[str, Any],
  prepare: Callable,
  secret: bytes,
) -> Lifeline:
  """The roll call: returns when all processes are there.

  Args:
    address: "host:port" of process 0, the same for all.
    process: this one's number.
    count: of all.
    timeout: seconds.
    host: name of this machine.
    about: what else process 0 learns of this process.
    prepare: on process 0: what everyone said of itself, in order -> what everyone is told.
    secret: of the job, the same for all; empty for a job that anybody may join.

  Raises:
    JoinError: naming the coordinator and who is missing.
  """
  host, place = wire.name(host), addresses.split(address)
  deadline = time.monotonic() + timeout
  me = f"process {process} of {count} ({host})"
  if process == 0:
    hub = Hub(*place, count, secret=secret, timeout=timeout, prepare=prepare)
    place = hub.own_address
  channel = _reach(place, deadline, me, address, timeout, secret=secret, count=count)
  try:
    channel.send("hello", process=process, of=count, host=host, pid=os.getpid(), about=about)
    # Process 0 has its own deadline, and says who is missing.
    message = next(channel.messages(until=deadline + 10), None)
  except (OSError, wire.WireError) as error:
    raise JoinError(f"{me}: the connection to the coordinator {address} broke: {error}") from error
  if message is None:
    raise JoinError(f"{me}: the coordinator {address} (process 0) ended, or did not answer in {timeout:.0f} s.")
  if message.kind == "refused":
    raise JoinError(f"{me}: {message.fields['text']}")
  if message.kind != "welcome":
    raise JoinError(f"{me}: the coordinator {address} (process 0) spoke out of turn: {message.kind}.")
  hosts = [wire.name(str(name)) for name in message.fields["hosts"]]
  return Lifeline(channel, process, count, host=host, hosts=hosts, about=message.fields["about"])


def _reach(place: tuple[str, int], deadline: float, me: str, address: str, timeout: float, **job: Any) -> Channel:
  while True:
    try:
      return Channel(*place, until=deadline, **job)
    except JoinError as error:
      raise JoinError(f"{me}: the coordinator {address}: {error}") from error
    except OSError as error:
      if time.monotonic() > deadline:
        raise JoinError(
          f"{me}: no connection to the coordinator {address} (process 0) within {timeout:.0f} s: {error}. Is process 0 "
          f"running on {place[0]}, may others reach its port {place[1]}, and is the address the same for all processes?"
        ) from error
    time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
