"""Where process 0 listens: at the coordinator's own address, and nowhere else as far as this machine can tell."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Iterable

from vit_jax.parallel.ending import JoinError

log = logging.getLogger(__name__)

SILENCE = 30  # seconds after which a machine that no longer answers counts as gone
_ELSEWHERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # an address that is not this machine's, or of no use here


def split(address: str) -> tuple[str, int]:
  """ "host:port" and "[::1]:port" as host and port."""
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)


def join(host: str, port: int) -> str:
  return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
  """Whether this names the machine itself to itself: whoever is reached there is on the same machine."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost" or host.endswith(".localhost")


def plain(address: str) -> str:
  """An IPv4 address as such, also where a socket for both kinds shows it as ::ffff:10.0.0.1."""
  try:
    parsed = ipaddress.ip_address(address)
  except ValueError:
    return address
  return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def listen(host: str, port: int, *, backlog: int) -> list[socket.socket]:
  """Sockets at the addresses that a host's name has here.

  All interfaces of the machine only if it cannot tell which one is meant: its name leads to the loopback, as Debian's
  /etc/hosts has it, while the others find it elsewhere; or to no address of its own, behind address translation.

  Raises:
    JoinError: if the port is in use.
  """
  listeners: list[socket.socket] = []
  try:
    for family, address in _addresses(host, port):
      try:
        listeners.append(socket.create_server(address, family=family, backlog=backlog))
      except OSError as error:
        if error.errno not in _ELSEWHERE:
          raise
    if not listeners:
      log.info("%s leads to no address of this machine that others could reach: listening at all its interfaces.", host)
      both = socket.has_dualstack_ipv6()
      family = socket.AF_INET6 if both else socket.AF_INET
      listeners.append(socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=backlog))
  except OSError as error:
    for listener in listeners:
      listener.close()
    raise JoinError(
      f"process 0: cannot listen at the coordinator's port {port} of {join(host, port)}: {error.strerror}. Another job "
      "may use it: choose another with --coordinator=HOST:PORT."
    ) from error
  for listener in listeners:
    listener.setblocking(False)
  return listeners


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
  """What to bind, as (family, address); none if this machine cannot tell."""
  try:
    known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  except OSError:
    return []
  found = list(dict.fromkeys((family, address) for family, _, _, _, address in known))
  if not is_loopback(host) and any(is_loopback(address[0]) for _, address in found):
    return []
  return found


def of_service(reached: Iterable[str]) -> str | None:
  """The one address of process 0 at which a job's other processes have come; None if there are several.

  Those on its own machine may have come by the loopback. They count only if there are no others.
  """
  found = {plain(address) for address in reached}
  outside = {address for address in found if not is_loopback(address)} or found
  return outside.pop() if len(outside) == 1 else None


def keep_alive(connection: socket.socket) -> None:
  """Lets the kernel find out that the other machine is gone, whatever this program is busy with."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  settings = {"TCP_KEEPIDLE": SILENCE // 3, "TCP_KEEPINTVL": SILENCE // 6, "TCP_KEEPCNT": 4}
  settings["TCP_USER_TIMEOUT"] = 1000 * SILENCE
  for name, value in settings.items():
    if hasattr(socket, name):  # by operating system
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
