"""The step: one program, traced once, that takes its state over."""

from collections.abc import Callable

import chex
import jax
import numpy as np
import optax

from jaxpipe import reference_value_and_grad, unplace
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.run import LmRun, build_run
from jaxpipe.training.loop.step import make_train_step
from jaxpipe.training.plan.state import TrainState, create_state


def first(setup: LmRun) -> TrainState:
  return create_state(
    setup.stack, setup.optimizer, setup.config.seed, setup.batch_shapes, setup.schedule, setup.mesh
  )


def test_the_step_compiles_once_donates_and_equals_the_reference(
  tiny: Callable[..., Config],
) -> None:
  setup = build_run(tiny(dropout=0.1, seed=5))
  begin = state = first(setup)
  params = jax.device_get(unplace(state.params, setup.stack, setup.schedule))
  once = chex.assert_max_traces(setup.value_and_grad, n=1)
  step = make_train_step(once, setup.optimizer, setup.learning_rate, 5, state, setup.mesh)
  # Ahead of time, as the loop does: another layout of the state than at first is then an error.
  compiled = step.lower(state, setup.batch_shapes).compile()
  reference = reference_value_and_grad(setup.stack, microbatches=4)
  opt_state = setup.optimizer.init(params)
  for k in range(2):
    key = jax.random.fold_in(jax.random.key(5), k)
    (loss, _), grads = reference(params, setup.train[k], key)
    updates, opt_state = setup.optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    state, result = compiled(state, setup.train[k])
    np.testing.assert_allclose(result.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(result.grad_norm, optax.tree.norm(grads), rtol=1e-5)
    np.testing.assert_allclose(result.learning_rate, 1e-2 * (k + 1) / 4, rtol=1e-6)
  assert int(state.step) == 2
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(begin.params))
  got = unplace(state.params, setup.stack, setup.schedule)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, params)
