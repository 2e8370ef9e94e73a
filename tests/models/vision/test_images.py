"""Networks on images: what patches and gates mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpipe.models.vision.gmlp import GmlpConfig, SpatialGate
from jaxpipe.models.vision.images import classify, cut
from jaxpipe.models.vision.vit import VitConfig

FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def test_patches_are_cut_in_reading_order() -> None:
  image = jnp.arange(16).reshape(1, 4, 4, 1)
  assert cut(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_the_gate_lets_everything_through_at_first() -> None:
  gate = SpatialGate(GmlpConfig(hidden=8), nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 16, 8))
  np.testing.assert_allclose(gate(x), x[..., :4], rtol=0.05, atol=1e-6)


def test_the_gate_mixes_patches(float64) -> None:
  """One patch's gate half reaches all patches; its open half stays where it is."""
  gate = SpatialGate(GmlpConfig(hidden=8, **FLOAT64), nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 16, 8), jnp.float64)

  def reached(y):
    return np.abs(gate(y) - gate(x)).max(axis=(0, 2)) > 0

  assert reached(x.at[0, 3, :4].add(1.0)).tolist() == [t == 3 for t in range(16)]
  assert reached(x.at[0, 3, 4].add(1.0)).all()


def test_rows_of_weight_0_count_nowhere() -> None:
  logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [9.0, 0.0]])
  inputs = {"label": jnp.array([0, 0, 1]), "weights": jnp.array([1.0, 1.0, 0.0])}
  loss, weight, metrics = classify(logits, inputs)
  assert (float(weight), float(metrics["correct"])) == (2, 1)
  np.testing.assert_allclose(loss, 2 * np.log(1 + np.exp(-2)) + 2, rtol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: VitConfig(patch=3), "patches of 3x3 do not tile 8x8 pixels; use one of 1, 2, 4, 8"),
    (lambda: VitConfig(heads=5), "width 64 cannot be cut into 5 heads; use a divisor"),
    (lambda: GmlpConfig(hidden=7), "7 hidden channels cannot be halved; use an even number"),
  ],
)
def test_shapes_that_do_not_fit_say_so(make, message: str) -> None:
  with pytest.raises(ValueError) as caught:
    make()
  assert str(caught.value) == message
