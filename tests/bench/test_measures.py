"""The benchmarks beside PyTorch, on the smallest work: rows, their peers, and what is missing. No figure is tested."""

import sys

import pytest

from vit_jax import methods
from vit_jax.bench import attention, inference, knn, peer, startup, step
from vit_jax.cli import main

NOWHERE = {"model.name": "dinov3_vits16", "crops.global_size": "112", "crops.local_size": "48", "batch_size": "x"}


class FakePeer:
  """Answers at once, as a script beside it would."""

  name = "fake"

  def __init__(self, asked, script, settings):
    asked.append((script, settings))

  def step(self):
    pass

  def memory(self):
    return ""

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    pass


@pytest.fixture
def asked(monkeypatch):
  """What every peer that the benchmarks start is told."""
  settings = []
  for module in (attention, inference, knn):
    monkeypatch.setattr(module, "find_peer", lambda script, s: FakePeer(settings, script, s))
  return settings


def test_attention_is_compared_with_jax_and_with_pytorch(asked):
  case = attention.Case(tokens=5, batch=2, heads=2, head_dim=8, calls=2)
  rows = list(attention.compare(case, True, 0.0))
  assert [row.peer.split()[0] for row in rows] == ["jax", "fake"]
  assert all(row.ratio > 0 and row.ours.work == 2 and "with gradients" in row.name for row in rows)
  assert asked[0][1]["tokens"] == 5 and asked[0][1]["backward"] is True


def test_neighbours_are_compared_on_equal_work(asked):
  (row,) = knn.measure(0.0, knn.Case(keys=40, queries=10, width=4, k=3))
  assert row.ratio > 0 and row.ours.work == row.theirs.work == 10
  assert asked[0][1]["keys"] == 40 and asked[0][1]["what"] == "knn"


def test_a_step_has_a_row_beside_pytorch_eager_and_one_beside_it_compiled(monkeypatch):
  case, settings = step.CASES["cpu"][0], []

  class FakeStep:
    net = methods.get("dinov3").modules(case.config())

    def __init__(self, case):
      pass

    def step(self):
      pass

    def note(self, timing):
      return ""

  monkeypatch.setattr(step, "Ours", FakeStep)
  monkeypatch.setattr(step, "peer_python", lambda: "python")
  monkeypatch.setattr(step, "find_peer", lambda script, s: FakePeer(settings, script, s))
  rows = list(step.compare(case, 0.0))
  assert [s["compile"] for _, s in settings] == [False, True] and all(row.ratio > 0 for row in rows)
  assert settings[0][1]["mlp_hidden"] == 4 * settings[0][1]["width"] == 1536
  monkeypatch.setattr(step, "peer_python", lambda: None)
  (row,) = step.compare(case, 0.0)
  assert row.ratio is None and "no PyTorch" in row.note


def test_features_have_a_row_beside_each_library_and_say_which_is_missing(monkeypatch):
  def find_peer(script, settings):
    if settings["library"] == "timm":
      raise peer.MissingLibrary("no timm")
    return FakePeer([], script, settings)

  monkeypatch.setattr(inference, "find_peer", find_peer)
  monkeypatch.setattr(inference, "create_model", lambda name, **types: small(**types))
  rows = list(inference.measure(0.0, inference.Case(image_size=32, batch_size=2)))
  assert [row.peer for row in rows] == ["fake", "fake", None]
  assert rows[0].ratio > 0 and rows[1].ratio > 0 and rows[2].note == "no timm"


def small(**types):
  from vit_jax.models.zoo import create_model

  return create_model("dinov3_vitb16", depth=1, width=16, num_heads=2, mlp_hidden=32, **types)


def test_a_peer_that_lacks_a_library_says_which(tmp_path, monkeypatch):
  script = tmp_path / "torch_peer.py"
  script.write_text('print(\'{"missing": "no such library"}\')\n')
  monkeypatch.setattr(peer, "__file__", str(tmp_path / "peer.py"))  # scripts lie beside it
  monkeypatch.setattr(peer, "peer_python", lambda: sys.executable)
  with pytest.raises(peer.MissingLibrary, match="no such library"):
    peer.find_peer("lacking.py", {})


def test_a_run_that_makes_no_step_fails_with_what_it_said(tmp_path):
  with pytest.raises(startup.StartFailed, match="batch_size"):
    startup.start(tmp_path, "broken", NOWHERE)


def test_a_peer_that_must_be_there_is_asked_for_before_anything_is_measured(monkeypatch, capsys):
  monkeypatch.setattr(peer, "peer_python", lambda: None)
  assert main(["bench", "step", "--against=torch"]) == 2
  assert "there is no PyTorch in this environment" in capsys.readouterr().err
