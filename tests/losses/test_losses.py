"""The losses against the reference's values and gradients, and what must hold of them whatever the numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from vit_jax import losses

LOSS = dict(rtol=2e-6, atol=1e-6)


def assert_value_and_gradient(function, x, golden, *, rtol=1e-5):
  value, grad = jax.value_and_grad(function)(jnp.asarray(x))
  np.testing.assert_allclose(value, golden["value_f64"], **LOSS)
  np.testing.assert_allclose(grad, golden["grad_f64"], rtol=0, atol=rtol * np.abs(golden["grad_f64"]).max())


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("case", ["S2_T2_B4_K33", "S6_T2_B3_K40", "S1_T2_B5_K20"])
def test_dino_equals_the_reference(case, ignore):
  g = Golden("loss_dino_cls").under(case)
  golden = {key: g[f"ignore_diag_{int(ignore)}/{key}"] for key in ("value_f64", "grad_f64")}
  assert_value_and_gradient(
    lambda s: losses.dino(s, g["teacher_probs"], ignore_diagonal=ignore), g["student_logits"], golden
  )


@pytest.mark.parametrize("case", ["masked", "padded"])
def test_ibot_equals_the_reference(case):
  g = Golden("loss_ibot_patch")
  images, weights = g["student"].shape[0], g["masks_weight"]
  rows = g["student"].reshape(-1, 24)[g["mask_indices"]], g["teacher_probs"].reshape(-1, 24)[g["mask_indices"]]
  student, teacher = rows if case == "masked" else (g["padded/student"], g["padded/teacher_probs"])
  weights = np.pad(weights, (0, student.shape[0] - weights.shape[0]))
  assert_value_and_gradient(lambda s: losses.ibot(s, teacher, weights, num_crops=images), student, g.under(case))


@pytest.mark.parametrize("case", ["a", "b", "dup", "topk1", "topk2"])
def test_koleo_equals_the_reference(case, x64):
  g = Golden("loss_koleo").under(case)
  function = lambda x: losses.koleo(x, topk=2 if case == "topk2" else 1)  # noqa: E731
  assert_value_and_gradient(function, g["x"].astype(np.float64), g)
  value32 = function(jnp.asarray(g["x"]))
  np.testing.assert_allclose(value32, g["value_f64"], rtol=1e-2 if case == "dup" else 1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("topk", [1, 2])
def test_koleo_over_all_ranks_is_koleo_of_the_whole_batch(ranks, topk):
  g = Golden(f"distributed_{ranks}proc")
  whole = np.concatenate([g[f"rank{r}/koleo_x"] for r in range(ranks)])
  per_rank = np.mean([g[f"rank{r}/koleo_global_top{topk}/value_f64"] for r in range(ranks)])
  np.testing.assert_allclose(losses.koleo(jnp.asarray(whole), topk=topk), per_rank, rtol=1e-5)


def test_koleo_of_one_feature_says_what_to_change():
  with pytest.raises(ValueError, match="loss_group_size"):
    losses.koleo(jnp.ones((1, 4)))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("negative", [None, "both", "teacher_only"])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_gram_equals_the_reference(normalize, per_image, negative, flat):
  if flat and per_image:
    with pytest.raises(ValueError, match="per_image"):
      losses.gram(jnp.ones((3, 2)), jnp.ones((3, 2)))
    return
  g = Golden("loss_gram")
  name = {None: "plain", "both": "removeneg", "teacher_only": "teacherneg"}[negative]
  case = f"norm{int(normalize)}_img{int(per_image)}_{name}" + ("_flatinput" if flat else "")
  options = dict(normalize=normalize, per_image=per_image, remove_negative=negative)
  student, teacher = (g["student_flat"], g["teacher_flat"]) if flat else (g["student"], g["teacher"])
  assert_value_and_gradient(lambda s: losses.gram(s, teacher, **options), student, g.under(case))


def wave(shape, a):
  """The test tensor of the specification, section 12."""
  i = np.arange(np.prod(shape), dtype=np.float64)
  return np.sin(a * i + 0.11 * i**1.5).astype(np.float32).reshape(shape)


def test_gram_without_the_teachers_negatives_clips_the_student_where_both_are_negative():
  student, teacher = wave((2, 4, 3), 0.45), wave((2, 4, 3), 0.77)
  np.testing.assert_allclose(losses.gram(student, teacher, remove_negative="teacher"), 0.3857113, rtol=1e-6)
  np.testing.assert_allclose(losses.gram(student, teacher, remove_negative="teacher_only"), 0.6550011, rtol=1e-6)


def test_gram_sends_no_gradient_to_the_teacher():
  x = jnp.asarray(wave((2, 4, 3), 0.45))
  grad = jax.grad(lambda t: losses.gram(x, t))(x + 1)
  assert not np.any(grad)


@pytest.mark.parametrize("case", ["cls_a", "cls_b", "cls_one_iter", "patch_a", "patch_b_fewer"])
def test_sinkhorn_equals_the_reference(case):
  golden = Golden("teacher_targets")
  g, settings = golden.under(case), golden.settings[case]
  probs = losses.sinkhorn_knopp(g["logits"], settings["temperature"], iterations=settings["iterations"])
  np.testing.assert_allclose(probs, g["probs"], rtol=1e-4, atol=1e-7)
  if "probs_f64" in g:
    np.testing.assert_allclose(probs, g["probs_f64"], rtol=2e-5, atol=1e-8)
  np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["cls", "patch"])
def test_sinkhorn_over_all_ranks_is_sinkhorn_of_the_whole_batch(ranks, kind):
  g = Golden(f"distributed_{ranks}proc")
  logits = np.concatenate([g[f"rank{r}/{kind}_logits"] for r in range(ranks)])
  expected = np.concatenate([g[f"rank{r}/sinkhorn_{kind}/probs"] for r in range(ranks)])
  np.testing.assert_allclose(losses.sinkhorn_knopp(logits, g.settings["temp"]), expected, rtol=1e-4, atol=1e-6)


def test_sinkhorn_survives_logits_that_overflow_an_exponential(x64):
  logits = wave((6, 8), 0.37) * 40
  exact = losses.sinkhorn_knopp(logits.astype(np.float64), 1.0)
  for scale in (1.0, 100.0):
    probs = losses.sinkhorn_knopp(jnp.asarray(logits * scale, jnp.float32), 0.07)
    assert np.all(np.isfinite(probs))
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(losses.sinkhorn_knopp(jnp.asarray(logits, jnp.float32), 1.0), exact, rtol=2e-4, atol=1e-9)


def test_no_samples_have_no_loss_and_no_shares():
  """A batch without masked patches is legal where iBOT has no weight."""
  nothing = jnp.zeros((0, 8))
  for probs in (losses.sinkhorn_knopp(nothing, 0.07), losses.softmax_center(nothing, jnp.zeros(8), 0.07)):
    assert probs.shape == (0, 8) and probs.dtype == jnp.float32
  value, gradient = jax.value_and_grad(lambda x: losses.ibot(x, nothing, jnp.zeros(0), num_crops=4))(nothing)
  assert value == 0 and gradient.shape == (0, 8)


def test_losses_are_float32_for_bfloat16_inputs():
  half = lambda *shape: jnp.asarray(wave(shape, 0.3), jnp.bfloat16)  # noqa: E731
  probs = losses.sinkhorn_knopp(half(8, 6), 0.07)
  values = (
    probs,
    losses.dino(half(2, 4, 6), probs.reshape(2, 4, 6)),
    losses.ibot(half(8, 6), probs, jnp.ones(8), num_crops=2),
    losses.koleo(half(4, 6)),
    losses.gram(half(2, 4, 6), half(2, 4, 6)),
  )
  assert all(v.dtype == jnp.float32 for v in values)
