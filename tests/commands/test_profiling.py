"""`vit-jax profile` on a tiny model."""

from __future__ import annotations

from tests.train.jobs import ROOT, overrides
from vit_jax import cli


def test_profile_prints_where_the_time_goes_and_leaves_a_trace(tmp_path, capsys):
  small = overrides(mesh__data=2, mesh__replica=4, loss_group_size=1, koleo__loss_weight=0)
  command = ["profile", f"--config={ROOT}/configs/tiny.py", f"--workdir={tmp_path}", "--steps=1", *small]
  assert cli.main(command) == 0
  lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
  assert lines["ms a step"][3:7] == ["teacher", "forward", "backward", "rest"]
  for part in ("attention", "feed-forward", "heads", "losses", "optimizer, EMA", "collectives"):
    assert float(lines[part][-2]) > 0
  (trace,) = tmp_path.rglob("*.trace.json.gz")
  assert trace.relative_to(tmp_path).parts[0] == "profile" and list(trace.parent.glob("*.xplane.pb"))
