"""At which addresses process 0 listens."""

from __future__ import annotations

import socket

import pytest

from vit_jax.parallel import addresses
from vit_jax.parallel.ending import JoinError


def bound(host: str) -> set[str]:
  """Where a job with this coordinator listens."""
  listeners = addresses.listen(host, 0, backlog=1)
  found = {listener.getsockname()[0] for listener in listeners}
  for listener in listeners:
    listener.close()
  return found


def resolving(monkeypatch, **names: list[str]) -> None:
  """Lets names (with _ for dots) lead to these addresses, and others to none."""

  def look(host, port, **_):
    known = {name.replace("_", "."): found for name, found in names.items()}
    if host not in known:
      raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]

  monkeypatch.setattr(socket, "getaddrinfo", look)


def test_a_job_of_one_machine_listens_where_only_this_machine_comes():
  assert bound("127.0.0.1") == {"127.0.0.1"}
  assert bound("localhost") <= {"127.0.0.1", "::1"}


def test_the_coordinators_own_address_and_no_other(monkeypatch):
  resolving(monkeypatch, node1_net=["127.0.0.2"])
  monkeypatch.setattr(addresses, "is_loopback", lambda host: False)  # a network card, as far as this test goes
  assert bound("node1.net") == {"127.0.0.2"}


@pytest.mark.parametrize(
  "found",
  [
    ["127.0.1.1"],  # Debian's /etc/hosts; the others find another
    ["203.0.113.7"],  # in front of address translation
    [],
  ],
)
def test_where_the_machine_cannot_tell_it_listens_everywhere(found, monkeypatch):
  resolving(monkeypatch, node1=found)
  assert bound("node1") <= {"0.0.0.0", "::"}


def test_an_address_of_no_use_is_left_out(monkeypatch):
  resolving(monkeypatch, node1=["203.0.113.7", "127.0.0.2"])
  monkeypatch.setattr(addresses, "is_loopback", lambda host: False)
  assert bound("node1") == {"127.0.0.2"}


def test_a_port_in_use_is_named():
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(JoinError, match=f"cannot listen at the coordinator's port {port} of 127.0.0.1:{port}: Address"):
      addresses.listen("127.0.0.1", port, backlog=1)


@pytest.mark.parametrize(
  ("reached", "expected"),
  [
    (["10.0.0.5", "10.0.0.5"], "10.0.0.5"),
    (["10.0.0.5", "127.0.1.1", "::ffff:10.0.0.5"], "10.0.0.5"),  # one of the coordinator's own machine
    (["127.0.0.1", "127.0.0.1"], "127.0.0.1"),
    (["10.0.0.5", "10.1.0.5"], None),
    (["fd00::5"], "fd00::5"),
  ],
)
def test_jaxs_service_is_where_the_others_have_come(reached, expected):
  assert addresses.of_service(reached) == expected


@pytest.mark.parametrize(
  ("host", "expected"),
  [("127.0.0.1", True), ("127.0.1.1", True), ("::1", True), ("localhost", True), ("a.localhost", True)]
  + [("node1", False), ("10.0.0.5", False), ("0.0.0.0", False), ("localhost.example.org", False)],
)
def test_loopback_is_known(host, expected):
  assert addresses.is_loopback(host) == expected


def test_addresses_are_taken_apart_and_put_together():
  for host, port, text in (("node1", 9876, "node1:9876"), ("fd00::5", 1, "[fd00::5]:1")):
    assert addresses.split(text) == (host, port) and addresses.join(host, port) == text
