"""Where JAX's coordination service listens, so that few can reach it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from vit_jax.parallel import JoinError, addresses, jax_service


def meeting(*reached: str, machines: str = "abc") -> list[dict]:
  """What processes say of themselves that came by these addresses, on machines of these names."""
  pairs = zip(reached, machines, strict=False)
  return [{"host": f"h{m}", "pid": 1, "machine": m, "reached": r} for r, m in pairs]


def test_on_one_machine_jaxs_service_is_a_file_of_this_user():
  answers = jax_service.places("node1:9876", meeting("127.0.0.1", "10.0.0.5", machines="aa"))
  (place,) = {answer[key] for answer in answers for key in ("jax", "bind")}
  folder = Path(place.removeprefix("unix:")).parent
  assert place.startswith("unix:/") and folder.stat().st_mode & 0o777 == 0o700 and not list(folder.iterdir())
  folder.rmdir()


@pytest.mark.parametrize(
  ("folder", "machines"),
  [("missing", "aa"), ("long" * 40, "aa"), ("an odd #name", "aa"), ("good", [None, None]), ("good", "ab")],
)
def test_where_there_can_be_no_such_file_jaxs_service_is_at_the_loopback(folder, machines, monkeypatch, tmp_path):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
  if folder != "missing":
    (tmp_path / folder).mkdir()
  answers = jax_service.places("localhost:9876", meeting(*["127.0.0.1"] * 2, machines=machines))
  (bind,) = {answer["bind"] for answer in answers}
  port = bind.removeprefix("127.0.0.1:")
  assert port.isdecimal() and {answer["jax"] for answer in answers} == {f"localhost:{port}"}
  assert folder == "missing" or not list((tmp_path / folder).iterdir())


def test_on_several_machines_jaxs_service_listens_where_the_others_have_come(monkeypatch):
  monkeypatch.setattr(addresses, "is_loopback", lambda address: address == "127.0.1.1")
  answers = jax_service.places("node1:9876", meeting("127.0.1.1", "127.0.0.2", "127.0.0.2"))
  (bind,) = {answer["bind"] for answer in answers}
  host, port = addresses.split(bind)
  assert host == "127.0.0.2"
  assert [answer["jax"] for answer in answers] == [bind, f"node1:{port}", f"node1:{port}"]


def test_who_speaks_of_itself_in_another_way_is_named():
  first, second = meeting("127.0.0.1", "127.0.0.1")
  for wrong in (1, ["a"]):
    with pytest.raises(JoinError, match="a process on hb speaks of its"):
      jax_service.places("node1:9876", [first, second | {"machine": wrong}])
