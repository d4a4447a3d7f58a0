"""What strangers do to the coordinator's port. Each attack takes (host, port) and gives the connections it keeps open.

None of them knows the job's secret; `replayed_hello` has listened to a process that does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vit_jax.parallel import addresses, wire

Place = tuple[str, int]
ESCAPES = "\x1b]0;yours\x07\x1b[2J\x1b[31mroot\u202e"
FORGED = {"vit_jax": 1, "process": 1, "of": 99, "host": ESCAPES, "pid": 1, "gpus": None}


def connect(place: Place) -> socket.socket:
  connection = socket.create_connection(place, timeout=5)
  connection.settimeout(5)
  return connection


def say(connection: socket.socket, data: bytes) -> socket.socket:
  """Sends as much as is taken."""
  with contextlib.suppress(OSError):
    connection.sendall(data)
  return connection


def hear(connection: socket.socket, size: int) -> bytes:
  """What comes until the size or the end."""
  data = b""
  with contextlib.suppress(OSError):
    while len(data) < size and (more := connection.recv(size - len(data))):
      data += more
  return data


def meet(place: Place, secret: bytes) -> tuple[socket.socket, bytes, wire.Session]:
  """A connection, the proof that this secret gives on it, not sent yet, and what could be said after it."""
  connection = connect(place)
  challenge = hear(connection, wire.CHALLENGE_SIZE)
  proof = wire.prove(secret, challenge)
  return connection, proof, wire.Session(secret, challenge, proof, first=False, count=2)


def pretend(place: Place, secret: bytes, hello: dict) -> tuple[socket.socket, bytes]:
  """Speaks the language with this secret: the connection, and the answer to the proof."""
  connection, proof, session = meet(place, secret)
  say(connection, proof + session.pack("hello", **hello))
  return connection, hear(connection, wire.ANSWER_SIZE)


def hello(process: int, of: int = 2, host: str = "h1") -> dict:
  return {"process": process, "of": of, "host": host, "pid": 1, "about": {}}


def nested_json(place: Place) -> list[socket.socket]:
  return [
    say(connect(place), b"[" * 500_000 + b"\n"),
    say(connect(place), wire.challenge()[:8] + b"[" * 500_000 + b"\n"),
    say(connect(place), b'{"vit_jax":' * 100_000 + b"1" + b"}" * 100_000 + b"\n"),
  ]


def endless_line(place: Place) -> list[socket.socket]:
  kept = []
  for start in (b"", wire.challenge()[:8]):
    connection = connect(place)
    connection.settimeout(0.5)  # what is not read is not sent
    with contextlib.suppress(OSError):
      for _ in range(100):
        connection.sendall((start + b"a" * (1 << 20))[: 1 << 20])
        start = b""
    kept.append(connection)
  return kept


def never_reading(place: Place) -> list[socket.socket]:
  kept = []
  for _ in range(20):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.settimeout(5)
    with contextlib.suppress(OSError):
      connection.connect(place)
    kept.append(say(connection, json.dumps(FORGED).encode() + b"\n"))
  return kept


def slow_loris(place: Place) -> list[socket.socket]:
  kept = [connect(place) for _ in range(10)]
  for byte in wire.prove(b"x", wire.challenge())[:12]:
    for connection in kept:
      say(connection, bytes([byte]))
    time.sleep(0.05)
  return kept


def flood(place: Place) -> list[socket.socket]:
  kept = []
  for _ in range(400):
    with contextlib.suppress(OSError):
      kept.append(connect(place))
  return kept


def forged_hello(place: Place) -> list[socket.socket]:
  kept = [say(connect(place), json.dumps(FORGED).encode() + b"\n")]  # of the wire's first version
  for secret in (b"", b"a guess of theirs"):
    for lie in (hello(1), hello(1, of=99), hello(0, host=ESCAPES), hello(-1), hello(2**70)):
      connection, answer = pretend(place, secret, lie)
      assert answer in (wire.WRONG, b"")  # or not heard at all, in a crowd
      kept.append(connection)
  return kept


def replayed_hello(place: Place, secret: bytes) -> list[socket.socket]:
  """All that a process says, heard on its way and held back there, said again on another connection."""
  honest, proof, session = meet(place, secret)
  said = proof + session.pack("hello", **hello(1))
  answer = hear(say(honest, proof), wire.ANSWER_SIZE)
  assert len(answer) == wire.ANSWER_SIZE and answer != wire.WRONG
  replay = connect(place)
  hear(replay, wire.CHALLENGE_SIZE)
  say(replay, said)
  assert hear(replay, wire.ANSWER_SIZE) == wire.WRONG
  return [honest, replay]


def random_bytes(place: Place) -> list[socket.socket]:
  kept = [say(connect(place), bytes([n]) * n) for n in range(1, 40)]
  kept.append(say(connect(place), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
  kept.append(say(connect(place), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)))
  return kept


# What needs no secret, by name.
ATTACKS: dict[str, Callable[[Place], list[socket.socket]]] = {
  attack.__name__: attack
  for attack in (nested_json, endless_line, never_reading, slow_loris, flood, forged_hello, random_bytes)
}

FORGE = """
import sys
from jax._src.lib import _jax
client = _jax.get_distributed_runtime_client(sys.argv[1], 1, init_timeout=2, shutdown_on_destruction=False)
client.connect()
print("believed")
"""


def forged_jax_client(place: Place) -> bool:
  """Says to JAX's coordination service, if it is there, that it is process 1; returns whether it was believed."""
  done = subprocess.run(
    [sys.executable, "-c", FORGE, addresses.join(*place)], capture_output=True, text=True, timeout=60
  )
  return "believed" in done.stdout


def listening(process: int) -> list[Place]:
  """Where a process of this machine can be reached over the network."""
  sockets = set()
  with contextlib.suppress(OSError):
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
      with contextlib.suppress(OSError):
        sockets.add(os.readlink(descriptor))
  found = []
  for family, loopback in (("tcp", "127.0.0.1"), ("tcp6", "::1")):
    for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
      _, local, _, state, *_, inode = line.split()[:10]
      if state == "0A" and f"socket:[{inode}]" in sockets:
        found.append((loopback, int(local.rpartition(":")[2], 16)))
  return found
