"""Tracing and slicing of equations; what the mesh's types forbid and `trace` mends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from jaxpipe.pipeline.layer import equations as eq
from jaxpipe.pipeline.layer.trace import lenient, trace


@jax.custom_vjp
def tripled(x, w):
  return x * w


# A rule that is not the function's gradient, and that returns a fresh constant.
tripled.defvjp(lambda x, w: (x * w, w), lambda w, dy: (3 * dy, jnp.zeros(w.shape)))


@jax.custom_jvp
def bent(x):
  return jnp.sin(x)


bent.defjvp(lambda primals, tangents: (bent(*primals), 2 * tangents[0]))


def scan_zeros(x):
  body = lambda c, t: ((c[0] + jnp.sin(x) * t, c[1] * 2), c[0])  # noqa: E731
  (total, _), each = lax.scan(body, (jnp.zeros(x.shape), 1.0), jnp.arange(3.0), reverse=True)
  return total + each.sum(0)


def nested_loops(x):
  inner = lambda c: lax.fori_loop(0, 2, lambda i, a: a + c * x, jnp.ones(x.shape))  # noqa: E731
  return lax.scan(lambda c, _: (inner(c), None), jnp.zeros(x.shape), None, length=2)[0]


def rematerialized(x):
  return jax.checkpoint(scan_zeros)(x)


def branches(x):
  one = lax.cond(x.sum() > 3, lambda: x * x, lambda: jnp.zeros(x.shape))
  which = jnp.int32(x[0]) % 3
  three = [
    lambda: x,
    lambda: jnp.ones(x.shape),
    lambda: lax.cond(x[1] > 0, lambda: x, lambda: 3 * x),
  ]
  return one + lax.switch(which, three)


def under_vmap(x):
  return jax.vmap(lambda a: lax.cond(a > 2, lambda: a * a, lambda: 0.0))(x)


def rules(x):
  body = lambda c, t: (c + tripled(bent(x), jnp.cos(t) * jnp.ones(x.shape)), None)  # noqa: E731
  return lax.scan(body, jnp.zeros(x.shape), jnp.arange(2.0))[0]


def rule_alone(x):
  return tripled(x, x)


def root(x):
  solve = lambda f, y: jnp.sqrt(x) + 0 * y  # noqa: E731
  tangent = lambda g, y: y / g(jnp.ones(y.shape))  # noqa: E731
  return lax.custom_root(lambda y: y**2 - x, jnp.ones(x.shape), solve, tangent)


def solver(x):
  c = lax.fori_loop(0, 2, lambda i, c: c + x, jnp.zeros(x.shape))
  return jnp.linalg.solve(jnp.eye(2) * 3, c)


def two_axes():
  return jax.make_mesh((2, 2), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)


def over_mesh(function, x):
  """Runs `function` on each half of x, varying over both axes of a mesh."""

  def local(x):
    y = function(lax.pcast(x, "data", to="varying"))
    varying = [jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(y)]
    assert all(v == {"stage", "data"} for v in varying)
    return lax.pmean(y, "data")

  specs = dict(in_specs=Spec("stage"), out_specs=Spec("stage"))
  return jax.jit(jax.shard_map(local, mesh=two_axes(), **specs))(x)


MENDED = [scan_zeros, nested_loops, rematerialized, branches, under_vmap]
MENDED += [rules, rule_alone, root, solver]


@pytest.mark.smoke
@pytest.mark.parametrize("function", MENDED, ids=lambda f: f.__name__)
def test_functions_that_start_from_a_constant(function):
  """Their derivatives, too; the test is of no use where JAX does not refuse the function."""
  both = lambda x: (function(x), jax.vjp(function, x)[1](jnp.cos(x))[0])  # noqa: E731
  x = jnp.arange(4.0) + 1
  with pytest.raises((TypeError, ValueError)):
    over_mesh(both, x)
  halves = [both(half) for half in (x[:2], x[2:])]
  want = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
  got = over_mesh(lenient(both), x)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, want)


@pytest.mark.smoke
def test_a_while_loop_of_varying_length():
  def powers(x):
    start = (0, jnp.ones(x.shape))
    return lax.while_loop(lambda c: c[0] < x[0], lambda c: (c[0] + 1, c[1] * x), start)[1]

  got = over_mesh(lenient(powers), jnp.arange(4.0) + 1)
  np.testing.assert_allclose(got, [1, 2, 27, 64])


def reduced(x):
  return lax.psum(jnp.sin(x), "data") * x


def test_what_is_reduced_over_the_mesh_is_differentiated_over_it():
  """Off the mesh, the transpose of a sum over two devices would be a sum once more."""
  x = jnp.arange(4.0) + 1
  gradient = lambda x: jax.vjp(reduced, x)[1](jnp.cos(x))[0]  # noqa: E731
  np.testing.assert_allclose(over_mesh(lenient(gradient), x), over_mesh(gradient, x))


def test_a_sum_beside_a_loop_from_a_constant_says_what_to_do():
  both = lambda x: reduced(x) + scan_zeros(x)  # noqa: E731
  with pytest.raises(ValueError, match=r"there is psum.* beside it: .* jnp.zeros_like"):
    over_mesh(lenient(both), jnp.arange(4.0))
  inside = lambda x: lax.fori_loop(0, 2, lambda i, c: c + reduced(x), jnp.zeros(2))  # noqa: E731
  with pytest.raises(ValueError, match=r"there is psum.* beside it"):
    over_mesh(lenient(inside), jnp.arange(4.0))


def test_an_error_of_the_functions_own_is_raised_alone():
  def wrong(x):
    raise ValueError("mine")

  with pytest.raises(ValueError, match="mine") as error:
    over_mesh(lenient(wrong), jnp.arange(4.0))
  assert error.value.__context__ is None


def names(closed):
  return [equation.primitive.name for equation in getattr(closed, "jaxpr", closed).eqns]


@pytest.mark.smoke
def test_calls_are_expanded():
  inner = jax.checkpoint(lambda x: jax.jit(jnp.sin)(x) * jax.nn.relu(tripled(x, x)))
  traced = names(trace(jax.grad(lambda x: inner(x).sum()), jnp.arange(2.0)))
  assert "cos" in traced and not {"checkpoint", "remat2", "jit", "pjit"} & set(traced)


@pytest.mark.smoke
def test_slices():
  closed = trace(lambda x, y: (jnp.sin(x) * y, jnp.cos(y)), 1.0, 2.0)
  jaxpr = getattr(closed, "jaxpr", closed)
  (x, y), (product, cos) = jaxpr.invars, jaxpr.outvars
  name = lambda equations: [e.primitive.name for e in equations]  # noqa: E731
  assert name(eq.needed([product], jaxpr.eqns, {x, y})) == ["sin", "mul"]
  (sin,) = eq.depends(jaxpr.eqns, [x]) - {x, product}
  assert name(eq.needed([product, cos], jaxpr.eqns, {sin, y})) == ["mul", "cos"]
  assert eq.depends(jaxpr.eqns, [y]) == {y, product, cos}
  assert eq.used(jaxpr.eqns[:2], [cos, x]) == [x, sin, y, cos]
  assert eq.evaluate(jaxpr.eqns, {x: 0.0, y: 0.0}, [cos, product]) == [1, 0]
