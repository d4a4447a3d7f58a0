"""What every training method has in common: the state of a run."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax

Params = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class State:
  """Everything that a step reads and writes besides the batch: one pytree.

  A run that trains several students has dicts by student name in `student`, `teacher`, `opt_state`, `counters` and
  `model`, and in those parts of `own` that each student has for itself.

  Attributes:
    step: int32, steps done.
    student: the parameters that are trained, by sub-module: {"backbone": ..., ...}.
    opt_state: AdamW's moments of the student.
    key: the run's typed PRNG key; a step derives its own from it and `step`.
    counters: int32 scalars by name: "nonfinite", consecutive steps whose loss or gradient was not finite, and those of
      the method.
    model: the backbone that the parameters belong to (static).
    teacher: the moving average of the student, same structure, or None.
    own: what else the method keeps, by name; arrays that are spread over devices as parameters are.
    frozen: the parameters of a teacher that never changes, by sub-module, or None.
  """

  step: jax.Array
  student: Any
  opt_state: Any
  key: jax.Array
  counters: dict[str, Any]
  model: nn.Module = flax.struct.field(pytree_node=False)
  teacher: Any = None
  own: dict[str, Any] = flax.struct.field(default_factory=dict)
  frozen: Any = None

  def saved(self) -> State:
    """What a checkpoint holds: all but the frozen teacher, whose own file is read again."""
    return self.replace(frozen=None)
