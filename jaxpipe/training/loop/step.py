"""The training step: pipelined gradients and the optimizer's update, compiled as one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.training.plan.optimizer import widen
from jaxpipe.training.plan.run import Run
from jaxpipe.training.plan.state import TrainState

Tree = Any


class StepResult(NamedTuple):
  """The numbers of one step, arrays that are still on the devices.

  Attributes:
    loss: [], what is minimised: the mean over the targets (of text, in nats per token) and, with
      experts, the losses of their routers besides, which a validation loss does not have.
    grad_norm: [], global norm of the gradient before clipping.
    learning_rate: [], that the update was done with.
    metrics: the head's own metrics, summed over the batch.
  """

  loss: jax.Array
  grad_norm: jax.Array
  learning_rate: jax.Array
  metrics: Tree


def make_train_step(
  value_and_grad: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  seed: int,
  state: TrainState,
  mesh: Mesh,
  ema: float = 0.0,
) -> jax.stages.Wrapped:
  """Returns the jitted step of a run.

  Args:
    value_and_grad: `(params, batch, key) -> ((loss, metrics), grads)`, of the pipeline; of a stack
      with model state `(params, batch, key, state) -> ((loss, metrics, state), grads)`.
    optimizer: from `placed_optimizer`; clipping is part of it.
    learning_rate: `step -> rate`, the one that the optimizer has, for the record.
    seed: of dropout; step k draws from `fold_in(key(seed), k)`, whatever came before.
    state: a placed state or its placed shapes; the step's result lies like it.
    mesh: where the state lies.
    ema: decay of the moving average of the parameters, which begins at the first ones; 0: none.

  Returns:
    `step(state, batch) -> (state, StepResult)`. The given state is donated: it is gone afterwards.
  """

  def step(state: TrainState, batch: Tree) -> tuple[TrainState, StepResult]:
    # Counted in the state, not on the host: a resumed step draws what it would have drawn.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.step)
    model_state = state.model_state
    if model_state:
      (loss, metrics, model_state), grads = value_and_grad(state.params, batch, key, model_state)
    else:
      (loss, metrics), grads = value_and_grad(state.params, batch, key)
    wide = widen(state.params)  # weight decay reads parameters, and must not round in their dtype
    updates, opt_state = optimizer.update(grads, state.opt_state, wide)
    new = optax.apply_updates(state.params, updates)
    result = StepResult(loss, optax.tree.norm(grads), learning_rate(state.step), metrics)
    # In the average's own precision: what one step adds to it is small.
    average = optax.incremental_update(widen(new), state.average, 1 - ema) if ema else {}
    done = TrainState(
      params=new,
      opt_state=opt_state,
      step=state.step + 1,
      model_state=model_state,
      average=average,
    )
    return done, result

  # The result's shardings are fixed: left to the compiler, they may differ from those of the given
  # state, and the second call would compile the step again.
  alike = jax.tree.map(lambda leaf: leaf.sharding, state)
  places = (alike, NamedSharding(mesh, Spec()))
  return jax.jit(step, donate_argnums=0, out_shardings=places)


def compile_step(run: Run, state: TrainState) -> jax.stages.Compiled:
  """Compiles the step of a run, for a placed state or its placed shapes; runs nothing."""
  config = run.config
  step = make_train_step(
    run.value_and_grad,
    run.optimizer,
    run.learning_rate,
    config.seed,
    state,
    run.mesh,
    ema=config.ema,
  )
  return step.lower(state, run.rows.shapes(run.batch_shapes)).compile()
