"""Every optimizer that a flag names, against optax on one leaf per variable; rates and averages.

The other side never comes from the module that is tested: it is written out in optax here.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from networks.drawn import drawn

import jaxpipe
from jaxpipe.models.transformer import TransformerConfig, transformer
from jaxpipe.pipeline.update.variables import by_leaf
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.flags.flags import define_flags, parse_flags, read_flags
from jaxpipe.training.flags.run_config import OPTIMIZERS
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.load import load
from jaxpipe.training.lm.run import build_run
from jaxpipe.training.loop.checkpoint import Checkpoints
from jaxpipe.training.loop.loop import train
from jaxpipe.training.loop.metrics import read_records
from jaxpipe.training.plan.optimizer import learning_rate, placed_optimizer
from jaxpipe.training.plan.run_dir import RunDir
from jaxpipe.training.plan.state import (
  TrainState,
  canonical_shapes,
  state_shapes,
  state_shardings,
  to_canonical,
)

RATE, DECAY = 0.01, 0.2
# Adafactor factors what has 128 rows and columns or more.
MODEL = dict(vocabulary_size=128, layers=4, width=128, heads=2, kv_heads=1, mlp_width=136)


def is_matrix(params: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def inner_matrices(params: Any) -> Any:
  dims = optax.contrib.MuonDimensionNumbers()
  return jax.tree.map_with_path(
    lambda path, leaf: dims if path[0].key == "layers" and leaf.ndim == 2 else None, params
  )


def muon() -> optax.GradientTransformation:
  """Of optax whole, for a decay of zero."""
  return optax.contrib.muon(
    RATE,
    beta=0.95,
    adam_b2=0.95,
    muon_weight_dimension_numbers=inner_matrices,
    consistent_rms=0.2,
  )


# Name -> what optax calls it, with a constant rate and these decays, and other flags.
PLAIN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
  "adamw": (
    lambda: optax.adamw(RATE, 0.9, 0.95, weight_decay=DECAY, mask=is_matrix),
    dict(weight_decay=DECAY),
  ),
  "nadamw": (lambda: optax.nadamw(RATE, 0.8, 0.9, 1e-6, weight_decay=0), dict(
    beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.0)),
  "adam": (lambda: optax.adam(RATE, 0.9, 0.95), dict(weight_decay=0.0)),
  "sgd": (lambda: optax.sgd(RATE, 0.7), dict(weight_decay=0.0, beta1=0.7)),
  "lion": (
    lambda: optax.lion(RATE, 0.9, 0.99, weight_decay=DECAY, mask=is_matrix),
    dict(weight_decay=DECAY),
  ),
  "rmsprop": (lambda: optax.rmsprop(RATE, 0.9, 1e-8), dict(weight_decay=0.0)),
  "adafactor": (
    lambda: optax.adafactor(RATE, min_dim_size_to_factor=128), dict(weight_decay=0.0)),
  "lamb": (
    lambda: optax.lamb(RATE, weight_decay=DECAY, mask=is_matrix), dict(weight_decay=DECAY)
  ),
  "muon": (muon, dict(weight_decay=0.0)),
}  # fmt: skip


def parts(mesh: str) -> tuple[Any, Any, Any, Any]:
  mesh, _, freeze = mesh.partition(" ")
  stack = transformer(TransformerConfig(**MODEL), freeze)
  devices = jaxpipe.make_mesh(mesh)
  name = "interleaved-1f1b" if "fsdp" in mesh else "1f1b"
  schedule = jaxpipe.make_schedule(name, devices=devices.shape["stage"], microbatches=2)
  return stack, schedule, devices, drawn(stack)


@pytest.mark.sampled("name", list(OPTIMIZERS), 5)
@pytest.mark.sampled("mesh", ["stage:4", "stage:2,fsdp:2", "stage:2 layers/0/query/.*"], 1)
def test_an_optimizer_is_that_of_optax_on_each_variable(mesh: str, name: str) -> None:
  assert PLAIN.keys() == OPTIMIZERS.keys()
  plain, given = PLAIN[name]
  config = Config(
    optimizer=name, learning_rate=RATE, rate="constant", warmup_steps=0, clip_norm=0.5, **given
  )
  stack, schedule, devices, params = parts(mesh)
  tx = placed_optimizer(config, stack, schedule, devices)
  placed = jaxpipe.place(params, stack, schedule, devices)
  want = by_leaf(stack, params)
  one = optax.chain(optax.clip_by_global_norm(0.5), plain())
  state, own = jax.jit(tx.init)(placed), one.init(want)
  for step in range(3):
    grads = jax.tree.map(lambda p, step=step: jnp.cos(3 * p + step), params)
    updates, state = jax.jit(tx.update)(
      jaxpipe.place(grads, stack, schedule, devices), state, placed
    )
    placed = optax.apply_updates(placed, updates)
    updates, own = jax.jit(one.update)(by_leaf(stack, grads), own, want)
    want = optax.apply_updates(want, updates)
  got = by_leaf(stack, jaxpipe.unplace(placed, stack, schedule))
  # Three steps of about 0.01 in float32, of which Muon's iteration loses most digits.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_a_state_by_variable_is_saved_and_resumed_on_another_mesh(tmp_path: Path) -> None:
  config = Config(optimizer="lamb", ema=0.5)
  stack, schedule, devices, params = parts("stage:2,fsdp:2")
  tx = placed_optimizer(config, stack, schedule, devices)
  placed = jaxpipe.place(params, stack, schedule, devices)
  _, moments = jax.jit(tx.update)(placed, jax.jit(tx.init)(placed), placed)
  average = jaxpipe.place(jax.tree.map(lambda p: 2 * p, params), stack, schedule, devices)
  state = TrainState(params=placed, opt_state=moments, step=jnp.int32(5), average=average)
  wanted = state_shardings(state, stack, schedule, devices)
  assert jax.tree.structure(wanted) == jax.tree.structure(state)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state, stack, schedule, devices, {})
  checkpoints.wait()
  _, other, few, _ = parts("stage:4")
  shapes = state_shapes(stack, placed_optimizer(config, stack, other, few), other, averages=True)
  got = checkpoints.restore(5, canonical_shapes(shapes, stack, other, few), stack, other, few)
  checkpoints.close()
  before = to_canonical(state, stack, schedule, devices)
  after = to_canonical(got, stack, other, few)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  # It goes on where it lies now.
  tx = placed_optimizer(config, stack, other, few)
  jax.jit(tx.update)(got.params, got.opt_state, got.params)


def test_shapes_of_the_rate() -> None:
  flags = dict(learning_rate=2.0, warmup_steps=10, steps=110, final_rate=0.25)

  def rates(**changes: Any) -> np.ndarray:
    rate = learning_rate(Config(**{**flags, **changes}))
    return np.array([rate(k) for k in range(111)])

  ramp = 2 * np.arange(1, 11) / 10
  linear, constant, wsd = (
    rates(rate="linear"),
    rates(rate="constant", final_rate=0.1),
    rates(rate="wsd"),
  )
  for found in (linear, constant, wsd):
    np.testing.assert_allclose(found[:10], ramp, rtol=1e-6)
  np.testing.assert_allclose(linear[10:], np.linspace(2, 0.5, 101), rtol=1e-5)
  assert (constant[10:] == 2).all()
  assert (wsd[10:101] == 2).all()
  np.testing.assert_allclose(wsd[100:], np.linspace(2, 0.5, 11), rtol=1e-5)
  np.testing.assert_allclose(rates(rate="wsd", decay_steps=50)[60:], np.linspace(2, 0.5, 51), 1e-5)
  np.testing.assert_allclose(rates(final_rate=0.0)[-1], 0, atol=1e-6)


def test_noise_has_its_variance_and_does_not_depend_on_the_mesh() -> None:
  config = Config(
    optimizer="sgd", learning_rate=1.0, rate="constant", warmup_steps=0, weight_decay=0.0,
    clip_norm=0.0, gradient_noise=0.3,
  )  # fmt: skip

  def noises(mesh: str) -> list[Any]:
    stack, schedule, devices, params = parts(mesh)
    tx = placed_optimizer(config, stack, schedule, devices)
    zeros = jaxpipe.place(jax.tree.map(jnp.zeros_like, params), stack, schedule, devices)
    state, found = tx.init(zeros), []
    for _ in range(3):
      noise, state = jax.jit(tx.update)(zeros, state, zeros)
      found.append(jaxpipe.unplace(noise, stack, schedule))
    return found

  found = noises("stage:4")
  jax.tree.map(np.testing.assert_array_equal, found, noises("stage:2,fsdp:2"))
  for step, tree in enumerate(found):
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    np.testing.assert_allclose(values.var(), 0.3 / (1 + step) ** 0.55, rtol=0.1)
    assert abs(values.mean()) < 0.05 and len(np.unique(values)) > 0.97 * len(values)
  flat = [np.ravel(tree["layers"]["down"]["kernel"]) for tree in found]
  assert abs(np.corrcoef(flat[0], flat[1])[0, 1]) < 0.2


def test_averages_are_those_of_the_steps_and_are_what_is_measured_and_sampled(
  tiny: Callable[..., Config], tmp_path: Path
) -> None:
  setup = build_run(tiny(steps=3, ema=0.75, checkpoint_every=1, mesh="stage:2"))
  assert train(setup.begin()) == 0
  last = read_records(RunDir(tmp_path / "run").metrics)
  shapes = setup.stack.param_shapes()
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  checkpoints = Checkpoints(setup.folder.checkpoints, read_only=True)
  each = [checkpoints.restore_params(k, shapes, here) for k in (1, 2, 3)]
  got = checkpoints.restore_params(3, shapes, here, average=True)
  checkpoints.close()
  key = jax.random.fold_in(jax.random.key(setup.config.seed), 2**31)
  want = setup.stack.init(key, setup.batch_shapes)
  for params in each:
    want = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, want, params)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
  jax.tree.map(close, got, want)
  jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "run").params, got)
  placed = jaxpipe.place(got, setup.stack, setup.schedule, setup.mesh)
  state = TrainState(params=placed, opt_state=(), step=jnp.int32(3))
  loss = setup.validator()(state)["loss"]
  np.testing.assert_allclose(list(last)[-1]["validation_loss"], loss, rtol=1e-6)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(optimizer="adamax"), "--optimizer=adamax is unknown; use adamw, nadamw"),
    (dict(rate="step"), "--rate=step is unknown; use cosine, linear"),
    (dict(decay_steps=5), "--decay_steps=5 is for --rate=wsd"),
    (dict(optimizer="sgd", beta2=0.9), "--beta2=0.9 is not read by sgd"),
    (dict(optimizer="adafactor", epsilon=1e-6), "--epsilon=1e-06 is not read by adafactor"),
    (dict(beta1=1.0), "--beta1=1.0 is out of range; use 0 or more, below 1"),
    (dict(rate="wsd", decay_steps=5000), "is more than the 1900 steps after the warm-up"),
    (dict(rate="constant", final_rate=0.5), "--final_rate=0.5 is not read by --rate=constant"),
    (dict(final_rate=3.0), "--final_rate=3.0 is more than the peak"),
    (dict(ema=1.0), "--ema=1.0 is no decay"),
    (dict(gradient_noise=-1.0), "--gradient_noise=-1.0 is negative"),
    (dict(optimizer="lion", completep_base="64x2"), "--optimizer=lion has no --completep_base"),
  ],
)
def test_flags_that_no_optimizer_reads(changes: dict[str, Any], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    Config(**changes)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_auto_counts_what_the_placed_optimizer_holds(
  tiny: Callable[..., Config], name: str
) -> None:
  """The state was that of stacked arrays, which Adafactor cannot be placed for."""
  setup = build_run(tiny(schedule="auto", optimizer=name, mesh="stage:2", ema=0.5))
  assert setup.choice is not None
  chosen = next(c for c in setup.choice.candidates if c is setup.choice.best)
  assert chosen.bytes == setup.memory.total
  assert setup.memory.bytes["average"] == setup.memory.bytes["parameters"]


def test_noise_in_packed_rows_is_refused(tiny: Callable[..., Config]) -> None:
  with pytest.raises(ConfigError, match=r"--gradient_noise=0\.1: is for layers of one kind"):
    build_run(tiny(freeze="layers/0/.*", gradient_noise=0.1))


@pytest.mark.parametrize(
  "given, decay",
  [([], 0.1), (["--optimizer=adam"], 0.0), (["--optimizer=adam", "--weight_decay=0.3"], 0.3)],
)
def test_a_decay_that_is_not_given_is_the_optimizers(given: list[str], decay: float) -> None:
  values = flags.FlagValues()
  define_flags(Config(text="x"), values)
  parse_flags(["lm.py", *given], values)
  assert read_flags(Config, values).weight_decay == decay
