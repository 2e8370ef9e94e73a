"""What a module's call is given, by the names of its parameters."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxpipe
from jaxpipe.stack.context import Context
from jaxpipe.stack.module.signature import MODE_FLAGS, plan_call
from jaxpipe.stack.stack import LayerStack, StackError

BATCH = {
  "x": np.arange(12.0, dtype=np.float32).reshape(4, 3),
  "mask": np.eye(4, 3, dtype=np.float32),
}
X = jnp.asarray(BATCH["x"])


def spec_of(module, batch=BATCH):
  """The spec of one module in a row, and its parameters and state."""
  stack = LayerStack.from_modules([module], loss=lambda y, b: y.sum(-1), batch=batch)
  spec = stack.network.specs["layers/0"]
  return spec, *spec.init(jax.random.key(0))


def call(module, training, batch=BATCH):
  spec, params, state = spec_of(module, batch)
  context = Context(batch, training, jax.random.key(1), jnp.arange(4))
  return spec.run(params, state, training, X, context=context)[0]


FLAGGED = {
  "required": lambda flag: eval(f"lambda x, {flag}: x * (10 if {flag} else 1)"),
  "defaulted": lambda flag: eval(f"lambda x, {flag}=None: x * (10 if {flag} else 1)"),
  "by name": lambda flag: eval(f"lambda x, *, {flag}=False: x * (10 if {flag} else 1)"),
  "behind": lambda flag: eval(f"lambda x, mask=None, {flag}=True: x * (10 if {flag} else 1)"),
}


@pytest.mark.parametrize("flag", sorted(MODE_FLAGS))
@pytest.mark.parametrize("written", sorted(FLAGGED))
def test_each_flag_says_whether_it_trains_however_it_is_written(flag, written):
  function = FLAGGED[written](flag)

  class Own(nnx.Module):
    def __init__(self, rngs):
      pass

  # Of a class whose call has `self`: made of the function's own signature.
  Own.__call__ = eval(
    f"lambda self, {', '.join(_parameters(function))}: function({_passed(function)})",
    {"function": function},
  )
  for training in (True, False):
    says = MODE_FLAGS[flag] is training
    expected = function(X, **{flag: says})
    np.testing.assert_array_equal(call(function, training), expected)
    np.testing.assert_array_equal(call(Own, training), expected)


def _parameters(function):
  return [
    str(p) if p.kind is not p.KEYWORD_ONLY else f"*, {p}"
    for p in inspect.signature(function).parameters.values()
  ]


def _passed(function):
  return ", ".join(f"{p.name}={p.name}" for p in inspect.signature(function).parameters.values())


class LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x, mask=None, is_training=False):
    return nn.BatchNorm(use_running_average=not is_training)(nn.Dense(3)(x))


@pytest.mark.parametrize(
  "module", [LinenBlock(), nn.remat(LinenBlock, static_argnums=(3,))()], ids=["plain", "remat"]
)
def test_a_linen_flag_behind_a_default_is_told_by_position(module):
  """Named, a static argument of `nn.remat` would be traced."""
  spec, params, state = spec_of(module)
  variables = {"params": params, **state}
  for training in (True, False):
    got, after = spec.run(
      params, state, training, X, context=Context(BATCH, training, None, jnp.arange(4))
    )
    want = module.apply(
      variables, X, None, training, mutable=["batch_stats"] if training else False
    )
    want, changed = want if training else (want, {"batch_stats": state["batch_stats"]})
    np.testing.assert_array_equal(got, want)
    jax.tree.map(np.testing.assert_array_equal, after, changed)


@pytest.mark.parametrize(
  "module",
  [
    lambda x, attention_mask: x * attention_mask,
    lambda x, other=None, *, attention_mask: x * attention_mask,
    lambda x, **options: x * options["attention_mask"],
  ],
)
def test_entries_of_the_batch_are_given_by_name(module):
  got = call(jaxpipe.layer(module, attention_mask="mask"), True)
  np.testing.assert_array_equal(got, BATCH["x"] * BATCH["mask"])


def test_entries_reach_nnx_and_linen_modules_in_a_step():
  class Nnx(nnx.Module):
    def __init__(self, rngs):
      self.inner = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x, mask):
      return self.inner(x) * mask

  class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, bias, train):
      return nn.Dense(3)(x) + bias * (2 if train else 1)

  modules = [jaxpipe.layer(Nnx, mask="mask"), jaxpipe.layer(Linen(), bias="mask")]
  loss = lambda y, batch: (y**2).sum(-1)  # noqa: E731
  pipe = jaxpipe.pipeline(loss, modules, BATCH, mesh="stage:2", schedule="gpipe", microbatches=2)
  params = pipe.init(jax.random.key(0), BATCH)
  first, second = pipe.modules(params)

  def model(variables):
    graph, state, other = variables
    x = nnx.merge(graph, state)(BATCH["x"], BATCH["mask"])
    return loss(Linen().apply(other, x, BATCH["mask"], True), BATCH).mean()

  want = jax.grad(lambda s, o: model((nnx.graphdef(first), s, o)), (0, 1))(nnx.state(first), second)
  got = pipe.unplace(pipe.value_and_grad(params, BATCH)[1])["layers"]
  for a, b in zip(got, (nnx.to_pure_dict(want[0]), want[1]["params"]), strict=True):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-5), a, b)


REFUSED = [
  (lambda x, c: x, r"needs c.* jaxpipe.layer\(module, c="),
  (jaxpipe.layer(lambda x, m: x, m="nope"), "m='nope' is not in the batch, which has 'x', 'mask'"),
  (jaxpipe.layer(lambda x: x, x="mask"), "x is what the module before returns"),
  (lambda x, attention_mask: x, r"needs attention_mask.* jaxpipe.layer\(module, attention_mask="),
  (lambda x, rngs: x, "takes x and rngs"),
  (lambda: 1, "takes no argument"),
  (jaxpipe.layer(lambda x: x, mask="mask"), "has no parameter mask; it takes x"),
  (jaxpipe.layer(nn.Dense(3), mask="mask"), "has no parameter mask; it takes inputs"),
]


@pytest.mark.parametrize("module, said", REFUSED)
def test_what_a_stack_cannot_give_is_named(module, said):
  with pytest.raises(StackError, match=said):
    spec_of(module)


def test_the_context_goes_to_a_parameter_of_its_name_alone():
  seen = []

  def layer(x, mode="kept", context=None):
    seen.append((mode, context.training))
    return x

  call(layer, True)
  assert set(seen) == {("kept", True)}
  plan = plan_call("a head", lambda x, batch, scale=2: x, arguments=2, bound=True, context=False)
  assert plan.arguments(True, (1, 2)) == ([1, 2], {})


def test_a_flag_that_an_nnx_module_keeps_is_not_told_over_it():
  """`deterministic=None` of `nnx.Dropout` gives way to the attribute; False would switch it on."""
  off = nnx.Dropout(0.9, deterministic=True, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(call(off, True), X)
  on = functools.partial(nnx.Dropout, 0.9)
  assert (call(on, True) != X).any() and (call(on, False) == X).all()


def test_a_flag_that_a_partial_gives_is_given():
  """It was told over, so that a layer that its author had switched off trained."""
  layer = functools.partial(FLAGGED["defaulted"]("training"), training=False)
  np.testing.assert_array_equal(call(layer, True), X)
  layer = functools.partial(FLAGGED["defaulted"]("deterministic"), deterministic=True)
  np.testing.assert_array_equal(call(layer, False), 10 * X)
  np.testing.assert_array_equal(call(layer, True), 10 * X)


def test_a_linen_field_that_says_to_train_is_turned_in_evaluation():
  class Fielded(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
      return nn.BatchNorm(use_running_average=not self.train)(x) * (10 if self.train else 1)

  for module, trains in ((Fielded(), True), (Fielded(train=False), False)):
    spec, params, state = spec_of(module)
    variables = {"params": params, **state}
    for training in (True, False):
      context = Context(BATCH, training, None, jnp.arange(4))
      got = spec.run(params, state, training, X, context=context)[0]
      want = Fielded(train=trains and training).apply(variables, X, mutable=["batch_stats"])[0]
      np.testing.assert_array_equal(got, want)


def test_an_attribute_without_a_value_is_told_by_the_call():
  """`None` counted as a value, and Flax then asked for one."""
  spec, params, state = spec_of(functools.partial(nnx.BatchNorm, 3, use_running_average=None))
  context = Context(BATCH, True, None, jnp.arange(4))
  _, after = spec.run(params, state, True, X, context=context)
  assert (after["mean"] != 0).any()
  assert (spec.run(params, state, False, X, context=context)[1]["mean"] == 0).all()
