"""The state of a training run: one pytree, saved and restored but for what never changes."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax


@flax.struct.dataclass
class State:
  """Everything that a step reads and writes besides the batch.

  A distillation with several students has dicts by student name in `student`, `teacher`, `gram_teacher`, `opt_state`,
  `counters` and `model`.

  Attributes:
    step: int32, steps done.
    student: parameters by sub-module, {"backbone": ..., "dino_head": ..., "ibot_head": ...}.
    teacher: their moving average, same structure.
    gram_teacher: backbone parameters that anchor the Gram matrices, or None.
    opt_state: AdamW's moments of the student.
    key: the run's typed PRNG key; a step derives its own from it and `step`.
    counters: int32 scalars by name: "nonfinite", consecutive steps whose loss or gradient was not finite; with a gram
      teacher "gram_loaded" and "gram_refreshes", how often the teacher was copied to it.
    model: the backbone that the parameters belong to (static).
    frozen: the parameters of a teacher that never changes, by sub-module, or None.
    centers: running means of the teacher's scores, [K] by head ("dino", "ibot") with softmax centering, or None.
  """

  step: jax.Array
  student: Any
  teacher: Any
  gram_teacher: Any
  opt_state: Any
  key: jax.Array
  counters: dict[str, jax.Array]
  model: nn.Module = flax.struct.field(pytree_node=False)
  frozen: Any = None
  centers: Any = None

  def saved(self) -> State:
    """What a checkpoint holds: all but the frozen teacher, whose own file is read again."""
    return self.replace(frozen=None)
