"""Attention over cut rows against dense attention on one device, per leaf, in float64.

Each device differentiates its own loss inside the shard_map, as the pipeline does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from networks import lm

from jaxpipe.models.transformer.attention import attend, check_heads
from jaxpipe.parallel import sequence
from jaxpipe.parallel.mesh import AXES, make_mesh

H = 4
# c, ulysses, N, K: one key head for all, more than one but not for every device, one for each.
CASES = [
  (c, ulysses, N, K)
  for c in range(1, 9)
  for ulysses in range(1, c + 1)
  if c % ulysses == 0
  for N in [{1: 4, 2: 4, 3: 6}.get(ulysses, ulysses if ulysses % 2 == 0 else 2 * ulysses)]
  for K in (1, 2, N)
] + [(2, 2, 6, 3), (4, 2, 12, 3), (6, 6, 12, 4)]


def inputs(T, N, K, rows=2, seed=0):
  """Query, key, value, what the loss multiplies the result by, and documents."""
  rng = np.random.default_rng(seed)
  q, k, v, by = (rng.normal(size=(rows, T, heads, H)) for heads in (N, K, K, N))
  # Some of one position, some longer than a chunk, and one that comes back after another.
  ids = np.sort(rng.integers(0, max(2, T // 4), (rows, T)), axis=1).astype(np.int32)
  ids[0, T // 2 :] = ids[0, 0]
  return 2 * q, k, v, by, ids


def dense(q, k, v, ids):
  """Softmax over the keys up to the query and, with ids, of its own document."""
  T, G = q.shape[1], q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(a, G, axis=2) for a in (k, v))
  scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
  seen = np.tril(np.ones((T, T), bool))[None, None]
  if ids is not None:
    seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
  return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)


def loss(attention, q, k, v, by):
  out = attention(q, k, v)
  return jnp.sum(out * by), out


def grad(function, *arguments):
  """Gradients by q, k and v, and the output."""
  attention, *arrays = arguments
  return jax.grad(functools.partial(function, attention), argnums=(0, 1, 2), has_aux=True)(*arrays)


def program(T, c, ulysses, segments, tensor=1, core=lm.attention):
  """(q, k, v, by, ids) -> gradients by q, k and v and the output, each in natural order."""

  def local(q, k, v, by, ids):
    # The specs have typed all but ids as varying over `tensor`.
    q, k, v, by = (jax.lax.pcast(x, AXES[:-1], to="varying") for x in (q, k, v, by))
    ids = jax.lax.pcast(ids, AXES, to="varying") if segments else None
    own = [sequence.take_own(x) for x in (q, k, v, by)]
    attention = functools.partial(attend, core=core, ulysses=ulysses, segments_BS=ids, length=T)
    grads, out = grad(loss, attention, *own)
    return *grads, out

  heads, joined = P(None, None, "tensor"), P(None, ("sequence", *AXES[:4]), "tensor")
  everywhere = jax.shard_map(
    local,
    mesh=make_mesh({"sequence": c, "tensor": tensor}),
    in_specs=(heads,) * 4 + (P(),),
    out_specs=(joined,) * 4,
  )
  back = np.argsort(sequence.order(T, c))
  return jax.jit(lambda *xs: [x[:, back] for x in everywhere(*xs)])


def assert_exact(got, want):
  floor = 1e-3 * max(float(jnp.max(jnp.abs(b))) for b in want)
  for name, a, b in zip(("dq", "dk", "dv", "out"), got, want, strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype == jnp.float64, name
    scale = max(float(jnp.max(jnp.abs(b))), floor)
    assert float(jnp.max(jnp.abs(a - b))) <= 1e-12 * scale, name  # NaN fails


def compare(c, ulysses, N, K, segments, tensor=1, T=None):
  T = T or 6 * c
  q, k, v, by, ids = inputs(T, N, K)
  attention = functools.partial(dense, ids=ids if segments else None)
  grads, out = jax.jit(functools.partial(grad, loss, attention))(q, k, v, by)
  assert_exact(program(T, c, ulysses, segments, tensor)(q, k, v, by, ids), (*grads, out))


@pytest.mark.sampled(
  "c, ulysses, N, K, segments", [(*case, s) for case in CASES for s in (False, True)], 5
)
def test_cut_rows_are_exact(float64, c, ulysses, N, K, segments):
  compare(c, ulysses, N, K, segments)


# c, K, whether there are documents
OVER_TENSOR = ((2, 2, True), (4, 4, False))


@pytest.mark.smoke
@pytest.mark.sampled("ulysses", [1, 2, 4], 2)
def test_four_devices_are_exact(float64, ulysses):
  compare(4, ulysses, 8, 2, segments=True)


@pytest.mark.sampled("ulysses, c, K, segments", [(u, *x) for u in (1, 2) for x in OVER_TENSOR], 2)
def test_heads_may_be_cut_over_tensor_as_well(float64, ulysses, c, K, segments):
  compare(c, ulysses, 8, K, segments, tensor=2)


def test_one_device_with_documents_takes_any_length(float64):
  compare(1, 1, 4, 2, segments=True, T=7)


def test_documents_of_one_position_give_numbers(float64):
  """In every block but a position's own, all of its scores are -inf."""
  T = 16
  q, k, v, by, _ = inputs(T, 4, 2)
  ids = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  dq, dk, dv, out = program(T, 4, 1, segments=True)(q, k, v, by, ids)
  assert np.allclose(out, np.repeat(v, 2, axis=2), rtol=0, atol=1e-12)
  assert np.allclose(dv, by.reshape(2, T, 2, 2, H).sum(axis=3), rtol=0, atol=1e-12)
  assert np.abs(dq).max() <= 1e-12 and np.abs(dk).max() <= 1e-12


def test_scores_too_large_for_exp_are_exact(float64):
  q, k, v, by, _ = inputs(24, 4, 2)
  q = 500 * q
  attention = functools.partial(dense, ids=None)
  grads, out = jax.jit(functools.partial(grad, loss, attention))(q, k, v, by)
  *got, same = program(24, 4, 1, segments=False)(q, k, v, by, np.zeros((2, 24), np.int32))
  assert_exact((*got, same), (*grads, out))


def test_bfloat16_softmaxes_in_float32():
  q, k, v, by, ids = (jnp.asarray(x) for x in inputs(64, 4, 2))
  low = [x.astype(jnp.bfloat16) for x in (q, k, v, by)]
  got = program(64, 4, 1, segments=True)(*low, ids)
  want = jax.jit(functools.partial(grad, loss, functools.partial(dense, ids=ids)))
  grads, out = want(*(x.astype(jnp.float32) for x in low))
  for a, b in zip(got, (*grads, out), strict=True):
    assert a.dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs(a.astype(jnp.float32) - b))) < 2e-2 * float(jnp.max(jnp.abs(b)))


def test_outside_of_a_mesh_the_core_is_called_whatever_ulysses_is():
  q, k, v, _, _ = inputs(5, 4, 2)

  def core(q, k, v, is_causal):
    return q, k, v, is_causal

  got = attend(q, k, v, core=core, ulysses=4, length=5)
  assert got[0] is q and got[1] is k and got[2] is v and got[3] is True


def mapped(function, c):
  """The function of this device's query, key and value, on c devices."""
  others = tuple(axis for axis in AXES if axis != "sequence")
  return jax.shard_map(
    lambda *xs: function(*(jax.lax.pcast(x, others, to="varying") for x in xs)),
    mesh=make_mesh({"sequence": c}),
    in_specs=P(None, "sequence"),
    out_specs=P(None, ("sequence", *others)),
  )


def traced(T, c, ulysses, N=8, K=8, rows=1, backward=False):
  """Equations of one device."""
  attention = functools.partial(attend, core=lm.attention, ulysses=ulysses, length=T)
  run = (lambda q, k, v: grad(loss, attention, q, k, v, q)[0]) if backward else attention
  whole = [jnp.ones((rows, T, heads, H)) for heads in (N, K, K)]
  return list(equations(jax.make_jaxpr(mapped(run, c))(*whole).jaxpr))


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in equation.params.values():
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        yield from equations(getattr(inner, "jaxpr", inner))


def count(found, *names):
  return [sum(e.primitive.name.startswith(name) for e in found) for name in names]


@pytest.mark.parametrize("c, ulysses", [(2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (8, 8), (2, 2)])
def test_collectives_are_those_of_the_papers(c, ulysses):
  found = traced(4 * c, c, ulysses)
  gathers = [e for e in found if e.primitive.name.startswith("all_gather")]
  assert len(gathers) == 2 * (c // ulysses - 1)
  assert all(len(pair) == 2 for e in gathers for pair in e.params["axis_index_groups"])
  assert count(found, "all_to_all", "ppermute", "psum") == [4 if ulysses > 1 else 0, 0, 0]
  # Backward, keys and values visit again, and what was found for them goes home.
  found, visits = traced(4 * c, c, ulysses, backward=True), 2 * (c // ulysses - 1)
  sums = count(found, "reduce_scatter", "all_gather", "all_to_all", "ppermute")
  assert sums == [visits, 2 * visits, 8 if ulysses > 1 else 0, 0]


def test_an_odd_ring_gathers_once():
  assert count(traced(12, 3, 1), "all_gather", "ppermute") == [2, 0]


@pytest.mark.parametrize("c, ulysses", [(2, 1), (4, 1), (8, 1), (5, 1), (8, 2)])
def test_a_device_multiplies_three_half_blocks_and_two_a_visit(c, ulysses):
  """The program is one for all devices and branches nowhere, so all do the same."""
  T, N = 4 * c, 8
  found = traced(T, c, ulysses, N)
  products = [e for e in found if e.primitive.name == "dot_general"]
  visits, half = c // ulysses - 1, T * ulysses // (2 * c)
  assert len(products) == 2 * (2 * visits + 3)  # of scores and of values
  for e in products:
    contracted = e.params["dimension_numbers"][0][0]
    size = e.outvars[0].aval.size * np.prod([e.invars[0].aval.shape[i] for i in contracted])
    assert size == half * half * H * N // ulysses
  assert count(found, "cond", "while", "scan") == [0, 0, 0]
  both = traced(T, c, ulysses, N, backward=True)
  assert count(both, "dot_general") == [(2 + 5) * (2 * visits + 3)]


@pytest.mark.parametrize("N, K", [(4, 1), (4, 4)])
def test_no_product_looks_like_one_with_weights(N, K):
  """A policy that saves products without batch dims would keep scores, even of one row and head."""
  for c, ulysses in ((4, 1), (4, 2)):
    products = [e for e in traced(16, c, ulysses, N, K) if e.primitive.name == "dot_general"]
    assert products and all(e.params["dimension_numbers"][1][0] for e in products)


def test_the_backward_pass_is_left_no_scores():
  """However much a residual policy keeps: inputs, the result, and a number for each query."""
  T, c, N = 64, 4, 8
  shapes = []

  def run(q, k, v):
    attention = functools.partial(attend, core=lm.attention, length=T)
    out, back = jax.vjp(attention, q, k, v)
    shapes.extend(leaf.shape for leaf in jax.tree.leaves(back))
    return out

  jax.eval_shape(mapped(run, c), *(jnp.ones((1, T, N, H)) for _ in range(3)))
  whole, rows = (1, T // c, N, H), (1, N, 1, T // (2 * c), 1)
  assert sorted(s for s in shapes if np.prod(s) > 1) == sorted([whole] * 4 + [rows] * 2)


@pytest.mark.sampled("ulysses", [1, 2], 1)
def test_other_stages_need_not_take_part(ulysses):
  """Stage 0 attends, forward and backward, in a branch that stage 1 does not take."""
  T = 16
  q, k, v, by, _ = (jnp.asarray(x, jnp.float32) for x in inputs(T, 4, 2))
  attention = functools.partial(attend, core=lm.attention, ulysses=ulysses, length=T)

  def local(*xs):
    own = [sequence.take_own(jax.lax.pcast(x, AXES, to="varying")) for x in xs]

    def work(q, k, v, by):
      return grad(loss, attention, q, k, v, by)[0]

    def idle(q, k, v, by):
      return 0 * q, 0 * k, 0 * v

    grads = jax.lax.cond(jax.lax.axis_index("stage") == 0, work, idle, *own)
    return [x[None] for x in grads]

  everywhere = jax.shard_map(
    local,
    mesh=make_mesh("stage:2,sequence:4"),
    in_specs=P(),
    out_specs=P("stage", None, ("sequence", *AXES[1:4], "tensor")),
  )
  got = jax.jit(everywhere)(q, k, v, by)
  back = np.argsort(sequence.order(T, 4))
  attention = functools.partial(dense, ids=None)
  want, _ = jax.jit(functools.partial(grad, loss, attention))(q, k, v, by)
  for a, b in zip(got, want, strict=True):
    assert np.allclose(a[0][:, back], b, atol=1e-4 * float(jnp.max(jnp.abs(b))))
    assert not np.any(a[1])


def test_the_compiled_program_permutes_nothing():
  text = (
    program(16, 4, 2, segments=True)
    .lower(*(jnp.asarray(x) for x in inputs(16, 4, 2)))
    .compile()
    .as_text()
  )
  assert "all-gather" in text and "all-to-all" in text and "collective-permute" not in text


@pytest.mark.parametrize(
  "numbers, message",
  [
    ((6, 2, 4, 1, 1), "6 heads cannot be cut over tensor:4; use 4 or 8 heads"),
    ((8, 2, 4, 1, 1), "2 kv_heads cannot be cut over tensor:4; use 4 kv_heads"),
    ((12, 4, 2, 4, 4), r"ulysses=4 over sequence:4 .* 6 heads .*\(12 over tensor:2\); .*=2$"),
    ((8, 8, 1, 3, 4), "ulysses=3 does not divide the 4 devices of sequence:4; use ulysses=2 or 4"),
    ((8, 8, 1, 0, 4), "ulysses=0 does not divide the 4 devices of sequence:4; use ulysses=1"),
  ],
)
def test_heads_that_do_not_divide_name_what_does(numbers, message):
  with pytest.raises(ValueError, match=message):
    check_heads(*numbers)


def test_heads_that_divide():
  for numbers in [(8, 4, 2, 4, 4), (6, 1, 1, 6, 6), (6, 3, 1, 2, 8)]:
    check_heads(*numbers)


def test_shapes_that_are_not_those_of_the_row():
  q, k, v, _, ids = inputs(8, 4, 2)
  with pytest.raises(ValueError, match=r"8 positions on each device of sequence:1 .* row of 16"):
    attend(q, k, v, core=lm.attention, length=16)
  with pytest.raises(ValueError, match="segments of 4 positions for rows of 8"):
    attend(q, k, v, core=lm.attention, segments_BS=ids[:, :4], length=8)
  with pytest.raises(ValueError, match=r"ulysses=2 .* 3 heads of a device"):
    traced(8, 2, 2, N=3, K=3)
  with pytest.raises(ValueError, match="10 positions cannot be cut into 4 chunks"):
    traced(10, 2, 1)
