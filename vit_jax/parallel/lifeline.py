"""One connection from every process to process 0, from the roll call before the job begins to its end.

Over it the processes find each other, agree on things, and learn at once when one of them fails: a connection that ends
without a farewell is a process that was killed. The coordinator's address is that of the lifeline; everything on it is
a line of JSON. JAX's own service, whose only answer to a missing process is to abort, starts on a free port that the
roll call hands out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import selectors
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

log = logging.getLogger(__name__)

FAILED = 1  # exit code of the processes that end because another one failed
_SILENCE = 30  # seconds after which a machine that no longer answers counts as gone
_TICK = 0.1
_ENDED = "ended without a word: killed (out of memory?), or its machine went away"


class JoinError(RuntimeError):
  """The processes of the job did not come together."""


class Lifeline:
  """This process's end of the connection.

  Args:
    connection: to process 0, after the roll call.
    process: this one's number.
    count: of all.
    host: name of this machine.
    welcome: what the roll call answered.
  """

  def __init__(self, connection: socket.socket, process: int, count: int, host: str, welcome: Mapping[str, Any]):
    self.process, self.count, self.host = process, count, host
    self.welcome = welcome
    self._connection = connection
    self._sending = threading.Lock()
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
    agreed = self._agreements[what]
    with agreed.lock:  # held by the listener while the processes compare how far they are
      agreed.step = step
      return step in agreed.steps

  def check_same(self, what: str, value: str) -> None:
    """Returns when every process has said the same; otherwise the job fails, naming who said what."""
    self._send(same=what, value=value)
    self._same[what].wait()

  def meet(self, what: str) -> None:
    """Returns when every process is here, all for the same; otherwise the job fails."""
    self._meetings += 1
    self.check_same(f"meeting {self._meetings}", what)

  def agreed(self, what: str) -> bool:
    """Whether there was ever a step agreed on for this."""
    return bool(self._agreements[what].steps)

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
    _say(self.name, text)
    try:
      self._send(failed=text, code=others)
      if self.process == 0:
        time.sleep(1.0)  # the others hear of it through this process
    finally:
      _exit(code)

  def leave(self) -> None:
    """Says that this process ends as it should."""
    self._left = True
    self._send(bye=True)

  def _send(self, **message: Any) -> None:
    with self._sending:
      _send(self._connection, message)

  def _listen(self) -> None:
    with contextlib.suppress(OSError):
      for message in _messages(self._connection, self._pass_on):
        self._take(message)
    if not self._left:
      _say(self.name, f"stopping: process 0 of {self.count} ({self.welcome['hosts'][0]}) {_ENDED}")
      _exit(FAILED)

  def _pass_on(self) -> None:
    for what in sorted(self._asked):
      self._asked.discard(what)
      self._send(ask=what)

  def _take(self, message: Mapping[str, Any]) -> None:
    if "where" in message:
      agreed = self._agreements[message["where"]]
      agreed.lock.acquire()
      self._send(at=agreed.step, what=message["where"])
    elif "do" in message:
      agreed = self._agreements[message["do"]]
      agreed.steps.add(message["step"])
      agreed.lock.release()
    elif "same" in message:
      self._same[message["same"]].set()
    elif "failed" in message and message["process"] != self.process and not self._failing:
      _say(self.name, f"stopping: {message['failed']}")
      _exit(message["code"])


class _Agreed:
  """What one process knows of an agreement: the last step it asked about, and the steps agreed on."""

  def __init__(self) -> None:
    self.lock = threading.Lock()
    self.step = -1
    self.steps: set[int] = set()


def join(
  address: str, process: int, count: int, *, timeout: float, about: Mapping[str, Any], prepare: Callable
) -> Lifeline:
  """The roll call: returns when all processes are there.

  Args:
    address: "host:port" of process 0, the same for all.
    process: this one's number.
    count: of all.
    timeout: seconds.
    about: what the others learn of this process; "host" is its machine.
    prepare: on process 0: what everyone said of itself, in order -> what everyone is told.

  Raises:
    JoinError: naming the coordinator and who is missing.
  """
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + timeout
  me = f"process {process} of {count} ({about['host']})"
  if process == 0:
    _Hub(int(port), address, count, timeout, prepare)
  connection = _connect("127.0.0.1" if process == 0 else host.strip("[]"), int(port), deadline, me, address, timeout)
  _send(connection, {"vit_jax": 1, "process": process, "of": count, **about})
  try:
    # Process 0 has its own deadline, and says who is missing.
    answer = next(_messages(connection, deadline=deadline + 10), None)
  except OSError as error:
    raise JoinError(f"{me}: the connection to the coordinator {address} broke: {error}") from error
  if answer is None:
    raise JoinError(f"{me}: the coordinator {address} (process 0) ended, or did not answer in {timeout:.0f} s.")
  if "refused" in answer:
    raise JoinError(f"{me}: {answer['refused']}")
  return Lifeline(connection, process, count, about["host"], answer)


class _Hub:
  """Process 0's side: a thread that hears all processes and tells them what concerns all."""

  def __init__(self, port: int, address: str, count: int, timeout: float, prepare: Callable):
    both = socket.has_dualstack_ipv6()
    try:
      self._listener = socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=max(128, count)
      )
    except OSError as error:
      raise JoinError(
        f"process 0 of {count}: cannot listen at the coordinator's port {port} of {address}: {error.strerror}. Another "
        "job may use it: choose another with --coordinator=HOST:PORT."
      ) from error
    self._address, self._count, self._timeout, self._prepare = address, count, timeout, prepare
    self._deadline = time.monotonic() + timeout
    self._selector = selectors.DefaultSelector()
    self._buffers: dict[socket.socket, bytes] = {}
    self._numbers: dict[socket.socket, int] = {}
    self._hello: dict[int, Mapping[str, Any]] = {}
    self._left: set[int] = set()
    self._rounds: dict[str, dict[int, int]] = {}
    self._claims: defaultdict[str, dict[int, str]] = defaultdict(dict)
    self._begun = False
    self._selector.register(self._listener, selectors.EVENT_READ)
    threading.Thread(target=self._run, daemon=True, name="lifeline-hub").start()

  def _run(self) -> None:
    while True:
      for key, _ in self._selector.select(_TICK):
        if key.fileobj is self._listener:
          self._accept()
        else:
          self._read(key.fileobj)
      if not self._begun and time.monotonic() > self._deadline:
        self._refuse(
          f"only {len(self._hello)} of {self._count} processes came to the coordinator {self._address} within "
          f"{self._timeout:.0f} s. Missing: process {ranges(set(range(self._count)) - set(self._hello))}. See what "
          "they print; or give more time with --join_timeout=SECONDS."
        )
        return

  def _accept(self) -> None:
    connection, _ = self._listener.accept()
    _keep_alive(connection)
    self._buffers[connection] = b""
    self._selector.register(connection, selectors.EVENT_READ)

  def _read(self, connection: socket.socket) -> None:
    try:
      data = connection.recv(65536)
    except OSError:
      data = b""
    if not data:
      self._drop(connection)
      return
    *lines, self._buffers[connection] = (self._buffers[connection] + data).split(b"\n")
    for line in lines:
      try:
        message = json.loads(line)
        number = self._numbers.get(connection)
        if number is not None:
          self._take(number, message)
        elif message["vit_jax"] == 1:
          self._greet(connection, message)
      except (ValueError, KeyError, TypeError):
        log.warning("A stranger spoke to the coordinator's port %s; ignored.", self._address)
        self._drop(connection)
        return

  def _drop(self, connection: socket.socket) -> None:
    self._selector.unregister(connection)
    connection.close()
    self._buffers.pop(connection, None)
    number = self._numbers.pop(connection, None)
    if number is None:
      return
    if not self._begun:
      del self._hello[number]  # it may come again
    elif number not in self._left:
      self._left.add(number)
      self._fail(number, _ENDED, FAILED)

  def _greet(self, connection: socket.socket, hello: Mapping[str, Any]) -> None:
    number, other = hello["process"], self._hello.get(hello["process"])
    if hello["of"] != self._count or not 0 <= number < self._count:
      self._refuse(
        f"process {number} ({hello['host']}) was started as one of {hello['of']}, process 0 as one of {self._count}: "
        "--num_processes must be the same for all."
      )
    elif other is not None or self._begun:
      self._refuse(
        f"process_id {number} was given to {other['host']} (pid {other['pid']}) and to {hello['host']} (pid "
        f"{hello['pid']}): every process needs its own."
      )
    else:
      self._numbers[connection], self._hello[number] = number, hello
      if len(self._hello) == self._count:
        self._begin()

  def _begin(self) -> None:
    try:
      answers = self._prepare([self._hello[i] for i in range(self._count)])
    except JoinError as error:
      self._refuse(str(error))
      return
    self._begun = True
    self._selector.unregister(self._listener)
    self._listener.close()
    for connection, number in list(self._numbers.items()):
      _try_send(connection, answers[number])

  def _refuse(self, text: str) -> None:
    """Ends the roll call; process 0 is told last, as its end is the end of this thread."""
    for connection in sorted(self._buffers, key=lambda c: -self._numbers.get(c, self._count)):
      _try_send(connection, {"refused": text})

  def _take(self, number: int, message: Mapping[str, Any]) -> None:
    if "ask" in message and message["ask"] not in self._rounds:
      self._rounds[message["ask"]] = {}
      self._tell(where=message["ask"])
    elif "at" in message:
      found = self._rounds[message["what"]]
      found[number] = message["at"]
      if len(found) == self._count:
        del self._rounds[message["what"]]
        self._tell(do=message["what"], step=max(found.values()) + 1)
    elif "same" in message:
      self._compare(message["same"], number, message["value"])
    elif "failed" in message:
      self._left.add(number)
      self._fail(number, f"failed: {message['failed']}", message["code"])
    elif "bye" in message:
      self._left.add(number)

  def _compare(self, what: str, number: int, value: str) -> None:
    claims = self._claims[what]
    claims[number] = value
    if len(claims) < self._count:
      return
    del self._claims[what]
    if len(set(claims.values())) == 1:
      self._tell(same=what)
      return
    said = defaultdict(set)
    for process, claim in claims.items():
      said[claim].add(process)
    listed = "\n".join(f"  {claim}: process {ranges(who)}" for claim, who in said.items())
    self._tell(failed=f"{what} differs between the processes:\n{listed}", process=-1, code=FAILED)

  def _fail(self, number: int, text: str, code: int) -> None:
    who = self._hello[number]
    self._tell(
      failed=f"process {number} of {self._count} ({who['host']}, pid {who['pid']}) {text}", process=number, code=code
    )

  def _tell(self, **message: Any) -> None:
    # Process 0 last: it may end, and with it this thread.
    for connection, _ in sorted(self._numbers.items(), key=lambda pair: -pair[1]):
      _try_send(connection, message)


def _connect(host: str, port: int, deadline: float, me: str, address: str, timeout: float) -> socket.socket:
  while True:
    try:
      connection = socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic())))
      connection.settimeout(None)
      _keep_alive(connection)
      return connection
    except OSError as error:
      if time.monotonic() > deadline:
        raise JoinError(
          f"{me}: no connection to the coordinator {address} (process 0) within {timeout:.0f} s: {error}. Is process 0 "
          f"running on {host}, may others reach its port {port}, and is the address the same for all processes?"
        ) from error
    time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))


def _keep_alive(connection: socket.socket) -> None:
  """Lets the kernel find out that the other machine is gone, whatever this program is busy with."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  settings = {"TCP_KEEPIDLE": _SILENCE // 3, "TCP_KEEPINTVL": _SILENCE // 6, "TCP_KEEPCNT": 4}
  settings["TCP_USER_TIMEOUT"] = 1000 * _SILENCE
  for name, value in settings.items():
    if hasattr(socket, name):  # by operating system
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _messages(connection: socket.socket, idle: Callable[[], None] = lambda: None, deadline: float | None = None):
  """The messages of a connection until it ends (or the deadline); `idle` is called now and then."""
  buffer = b""
  while deadline is None or time.monotonic() < deadline:
    idle()
    if not select.select([connection], [], [], _TICK)[0]:
      continue
    data = connection.recv(65536)
    if not data:
      return
    *lines, buffer = (buffer + data).split(b"\n")
    yield from map(json.loads, lines)


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
  connection.sendall(json.dumps(message).encode() + b"\n")


def _try_send(connection: socket.socket, message: Mapping[str, Any]) -> None:
  """Sends; a connection that is broken is found out when it is read."""
  with contextlib.suppress(OSError):
    _send(connection, message)


def ranges(numbers: Sequence[int] | set[int]) -> str:
  """{0, 1, 2, 5} as "0-2, 5"."""
  parts: list[list[int]] = []
  for number in sorted(numbers):
    if parts and number == parts[-1][1] + 1:
      parts[-1][1] = number
    else:
      parts.append([number, number])
  return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in parts)


def _say(name: str, text: str) -> None:
  """In one write, so that lines of several processes do not mix."""
  sys.stderr.write("".join(f"vit-jax: {name}: {line}\n" for line in text.splitlines()))
  sys.stderr.flush()


def _exit(code: int) -> NoReturn:
  """At once: a regular end would wait for processes that are gone."""
  sys.stdout.flush()
  os._exit(code)
