"""Mixture of experts: every mesh gives the values and gradients of a loop over experts."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxpipe import make_mesh
from jaxpipe.models.transformer.moe import Experts, MoeConfig, check_experts, expert_dims
from jaxpipe.models.transformer.routing import assign
from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import AXES, ROWS
from jaxpipe.pipeline.compiled.hlo import parse
from jaxpipe.pipeline.compiled.walk import visits
from jaxpipe.pipeline.layer.varying import collectives, vary

B, T, D, F, E, K = 8, 32, 4, 6, 8, 2
DROPLESS = dict(capacity_factor=0.0, group=0)
TIGHT = dict(capacity_factor=1.0, group=2)  # one slot each: two positions that agree clash
ROOMY = dict(capacity_factor=1.1, group=8)  # three slots each
ROWWISE = dict(capacity_factor=0.5, group=0)


def config(**changes):
  return MoeConfig(**{**dict(experts=E, top_k=K, balance=0.3, z=0.2, **DROPLESS), **changes})


def module(config, positions_cut=False, dtype=jnp.float64):
  options = dict(dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), out_scale=0.5)
  return Experts(config, D, F, positions_cut=positions_cut, **options)


def numbers(config, alike=B // 2):
  """Parameters, x with the same token all over `alike` rows, and what the loss multiplies."""
  rng = np.random.default_rng(1)
  shapes = {name: p.shape for name, p in nnx.state(module(config)).items()}
  params = {name: rng.standard_normal(shapes[name]) for name in expert_dims(config)}
  x, of_y, of_aux = (rng.standard_normal(s) for s in ((B, T, D), (B, T, D), (B,)))
  x[:alike] = x[0, 0]
  return params, x, of_y, of_aux


def choices(params, x, config):
  """Experts of every token, best first [B, T, K], and whether they have a slot for it."""
  chosen = np.argsort(-(x @ params["router"]), axis=-1, kind="stable")[..., : config.top_k]
  S, factor = config.group or T, config.capacity_factor
  slots = math.ceil(round(factor * S * config.top_k / config.experts, 6)) if factor else T
  found = np.zeros(chosen.shape, bool)
  for b, start in itertools.product(range(B), range(0, T, S)):
    taken = [0] * config.experts
    for k, t in itertools.product(range(config.top_k), range(start, start + S)):
      e = chosen[b, t, k]
      found[b, t, k] = taken[e] < slots
      taken[e] += 1
  return chosen, found


def mlp(x, gate, up, down):
  opened = x @ gate
  return (opened / (1 + jnp.exp(-opened)) * (x @ up)) @ down


def oracle(params, x, chosen, found, config):
  """Applies every expert to every token; the choices say which of the results count."""
  logits = x @ params["router"]
  probability = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)
  wants = [jnp.any(chosen == e, axis=-1) for e in range(config.experts)]
  gets = [jnp.any((chosen == e) & found, axis=-1) for e in range(config.experts)]
  scale = sum(wants[e] * probability[..., e] for e in range(config.experts))
  y = jnp.zeros_like(x)
  for e in range(config.experts):
    weight = gets[e] * probability[..., e] / (scale if config.normalize else 1)
    y += weight[..., None] * mlp(x, *(params[n][e] for n in ("gate", "up", "down")))
  if config.shared:
    y += mlp(x, *(params[f"shared_{n}"] for n in ("gate", "up", "down")))
  often = jnp.stack([w.sum(axis=1) for w in wants], axis=-1) * config.experts / config.top_k / T
  uneven = T * jnp.sum(often * probability.mean(axis=1), axis=-1)
  square = jnp.sum(jnp.log(jnp.exp(logits).sum(axis=-1)) ** 2, axis=-1)
  return y, config.balance * uneven + config.z * square


@functools.cache
def expected(config, alike):
  """y, aux, gradients of parameters and x, and how many choices were dropped."""
  params, x, of_y, of_aux = numbers(config, alike)
  chosen, found = choices(params, x, config)

  def loss(params, x):
    y, aux = oracle(params, x, chosen, found, config)
    return jnp.sum(y * of_y) + jnp.sum(aux * of_aux), (y, aux)

  grads, (y, aux) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
  return jax.device_get((y, aux, *grads)), int(np.sum(~found))


def specs(config, positions_cut):
  """Where each parameter lies, and x."""
  lies = {"experts": config.axes, "mlp": () if config.folded else ("tensor",)}
  positions = ("sequence", "tensor") if positions_cut else ("sequence",)
  params = {
    name: PartitionSpec(*(lies.get(dim, ()) for dim in dims))
    for name, dims in expert_dims(config).items()
  }
  return params, PartitionSpec(ROWS, positions)


def held(count):
  """Positions as `count` devices hold them: chunk i of 2 count, then the i-th from the end."""
  chunks = np.arange(T).reshape(2 * count, -1)
  return np.concatenate([chunks[i] for d in range(count) for i in (d, 2 * count - 1 - d)])


def program(config, mesh, positions_cut):
  """Values and gradients over a mesh; y and aux as each device along `tensor` has them."""
  graph = nnx.graphdef(module(config, positions_cut))
  of_params, of_x = specs(config, positions_cut)

  def local(params, x, of_y, of_aux):
    params, x = vary((params, x), AXES)

    def loss(params, x):
      y, aux = nnx.merge(graph, nnx.State(params))(x)
      y = vary(axes.gather(y, "tensor", 1) if positions_cut else y, AXES)
      return jnp.sum(y * of_y) + jnp.sum(aux * of_aux), (y, vary(aux, AXES))

    grads, (y, aux) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    aux = jax.lax.psum(aux, "sequence")
    return y[None], aux[None], *jax.tree.map(whole, grads, (of_params, of_x))

  def whole(grad, spec):
    """The sum over all devices that hold a copy; all along `tensor` have counted the loss."""
    cut = {axis for entry in spec for axis in ([entry] if isinstance(entry, str) else entry or [])}
    return jax.lax.psum(grad, tuple(a for a in AXES if a not in cut)) / mesh.shape["tensor"]

  each = ("stage", "tensor")
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(of_params, of_x, PartitionSpec(ROWS, "sequence"), PartitionSpec(ROWS)),
    out_specs=(
      *(PartitionSpec(each, ROWS, "sequence"), PartitionSpec(each, ROWS)),
      *(of_params, of_x),
    ),
  )


def assert_exact(config, mesh, positions_cut, alike=B // 2):
  """Every leaf within 1e-12; returns how many choices were dropped."""
  mesh = make_mesh(mesh)
  params, x, of_y, of_aux = numbers(config, alike)
  order = held(mesh.shape["sequence"])
  back = np.argsort(order)
  got = jax.jit(program(config, mesh, positions_cut))(params, x[:, order], of_y[:, order], of_aux)
  y, aux, of_params, of_x = jax.device_get(got)
  want, dropped = expected(config, alike)
  found = {f"y {i}": one[:, back] for i, one in enumerate(y)}
  found |= {f"aux {i}": one for i, one in enumerate(aux)} | of_params | {"x": of_x[:, back]}
  wanted = {name: want[0] for name in found if name.startswith("y ")}
  wanted |= {name: want[1] for name in found if name.startswith("aux ")} | want[2] | {"x": want[3]}
  assert found.keys() == wanted.keys()
  for name, leaf in wanted.items():
    np.testing.assert_allclose(
      found[name], leaf, rtol=0, atol=1e-12 * np.abs(leaf).max(), err_msg=name
    )
  return dropped


MESHES = [
  # mesh, axes of the experts, whether positions are cut over `tensor`
  ("expert:1", ("expert",), False),
  ("expert:2", ("expert",), False),
  ("expert:4", ("expert",), False),
  ("expert:8", ("expert",), False),
  ("data:2,expert:2", ("data", "expert"), False),
  ("data:2,expert:2", ("expert", "data"), False),
  ("data:2,fsdp:2,expert:2", ("data",), False),
  ("data:4", (), False),
  ("sequence:8", ("sequence",), False),
  ("expert:2,sequence:4", ("expert",), False),
  ("expert:2,sequence:2,tensor:2", ("expert", "sequence"), False),
  ("expert:2,sequence:2,tensor:2", ("expert",), True),
  ("expert:2,tensor:2", ("expert",), False),
  ("expert:2,tensor:2", ("expert",), True),
  ("tensor:4", ("tensor",), True),
  ("tensor:2", ("tensor",), True),
  ("sequence:2,tensor:2", ("tensor", "sequence"), True),
  ("expert:2,sequence:2,tensor:2", ("expert", "tensor"), True),
]


@pytest.mark.sampled("mesh, over, positions_cut", MESHES, 3)
def test_every_mesh_gives_what_one_device_gives(float64, mesh, over, positions_cut):
  assert assert_exact(config(axes=over), mesh, positions_cut) == 0


@pytest.mark.sampled("mesh, over, positions_cut", MESHES, 3)
def test_the_same_tokens_are_dropped_on_every_mesh(float64, mesh, over, positions_cut):
  assert assert_exact(config(axes=over, **TIGHT), mesh, positions_cut) > 0


@pytest.mark.sampled(
  "changes, mesh, positions_cut",
  [
    (dict(shared=6, normalize=False), "expert:2,tensor:2", True),
    (dict(shared=6, normalize=False), "expert:2,tensor:2", False),
    (dict(shared=6, axes=("tensor",), **ROOMY), "tensor:4", True),
    (dict(top_k=3), "expert:8", False),  # a device has fewer experts than a token visits
    (dict(top_k=1, normalize=False, balance=0.0), "expert:4", False),
    (dict(top_k=3, axes=("sequence",), **ROOMY), "data:2,sequence:2", False),
    (dict(top_k=8, z=0.0, **{**ROOMY, "capacity_factor": 0.5}), "expert:2,tensor:2", True),
    (dict(normalize=False, **ROWWISE), "expert:4,tensor:2", True),
  ],
  2,
)
def test_every_option_on_a_mesh(float64, changes, mesh, positions_cut):
  dropped = assert_exact(config(**changes), mesh, positions_cut)
  assert (dropped > 0) == bool(changes.get("capacity_factor"))


@pytest.mark.sampled("top_k", [1, 3], 1)
def test_dropless_has_room_for_all_tokens_on_one_device(float64, top_k):
  assert_exact(config(top_k=top_k), "expert:4", False, alike=B)


def test_slots_are_counted_in_decimals_and_rounded_up():
  assert config(capacity_factor=1.1, experts=4).capacity(100) == 55  # 1.1 * 100 * 2 / 4 > 55
  assert config(capacity_factor=1.1).capacity(8) == 3
  assert config(capacity_factor=9.0).capacity(8) == 8  # no more than there are positions


def test_first_choices_of_all_positions_stand_before_second_ones():
  chosen = np.array([[[0, 1], [1, 0], [0, 2]]])  # one group of three positions
  slots = assign(chosen, experts=3, capacity=2)
  # Expert 0 is wanted by 0 and 2 first, then by 1; expert 1 by 1, then by 0.
  np.testing.assert_array_equal(slots.token_EGC[:, 0], [[0, 2], [1, 0], [2, 3]])
  np.testing.assert_array_equal(slots.slot_NK, [[0, 3], [2, 6], [1, 4]])


def forward(config, mesh, positions_cut=False):
  """What one call communicates over a mesh: names and axes, and the compiled program's shapes."""
  graph, mesh = nnx.graphdef(module(config, positions_cut)), make_mesh(mesh)
  of_params, of_x = specs(config, positions_cut)
  call = jax.shard_map(
    lambda params, x: nnx.merge(graph, nnx.State(params))(vary(x, AXES))[0],
    mesh=mesh,
    in_specs=(of_params, of_x),
    out_specs=PartitionSpec(("stage", *ROWS), ("sequence", "tensor")),
  )
  params, x, _, _ = numbers(config)
  compiled = jax.jit(call).lower(params, x).compile().as_text()
  moved = [
    (visit.instruction.opcode, sum(8 * shape.size for shape in visit.instruction.shapes))
    for visit in visits(parse(compiled))
    if visit.instruction.opcode.startswith(("all-", "reduce-scatter", "collective"))
  ]
  return sorted(collectives(jax.make_jaxpr(call)(params, x))), sorted(moved)


@pytest.mark.parametrize("mesh, over", [("expert:4", "expert"), ("sequence:4", "sequence")])
def test_slots_move_by_two_exchanges_of_their_size(float64, mesh, over):
  named, moved = forward(config(axes=(over,), capacity_factor=2.0, group=4), mesh)
  named = [pair for pair in named if pair[0] != "psum_invariant"]  # of the counts, over `sequence`
  assert named == [("all_to_all", frozenset([over]))] * 2
  # capacity_factor * top_k * n * D elements of 8 bytes, of which a quarter stays.
  assert moved == [("all-to-all", 2 * K * (B * T // 4) * D * 8)] * 2


def test_dropless_gathers_tokens_and_adds_results(float64):
  _, moved = forward(config(), "expert:4")
  assert ("all-gather", B * T * D * 8) in moved
  assert [pair for pair in moved if pair[0] != "all-gather"] == [
    ("reduce-scatter", B * T // 4 * D * 8)
  ]


@pytest.mark.parametrize("kind", [TIGHT, DROPLESS])
def test_nothing_is_sent_where_each_device_has_all_experts(float64, kind):
  assert forward(config(**kind), "data:4") == ([], [])


def test_experts_compute_in_their_dtype_and_the_router_in_float32():
  experts = module(config(**ROOMY), dtype=jnp.bfloat16)
  y, aux = jax.eval_shape(experts, jax.ShapeDtypeStruct((2, 8, D), jnp.bfloat16))
  assert (y.dtype, aux.dtype) == (jnp.bfloat16, jnp.float32)
  assert experts.gate.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(top_k=9), r"top_k 9 of 8 experts is impossible; use 1 to 8"),
    (dict(top_k=0), r"top_k 0 of 8 experts"),
    (dict(capacity_factor=-1.0), r"capacity_factor -1.0 is not a number from 0 up"),
    (dict(balance=math.nan), r"balance nan is not a number from 0 up"),
    (dict(axes=("expert", "stage")), r"experts cannot lie over \['stage'\]; the axes are data, "),
    (dict(axes=("data", "data")), r"\('data', 'data'\): an axis stands twice"),
  ],
)
def test_impossible_configurations(changes, message):
  with pytest.raises(ValueError, match=message):
    config(**changes)


def test_experts_that_do_not_divide():
  over = config(axes=("data", "expert"))
  check_experts(over, {"data": 2, "expert": 4, "tensor": 3})
  with pytest.raises(ValueError, match=r"8 experts .* 6 devices \(data:2, expert:3\); use 6 or 12"):
    check_experts(over, {"data": 2, "expert": 3})
  with pytest.raises(ValueError, match=r"use 6 or 12 experts, or 4 or 8 devices"):
    check_experts(over, {"data": 2, "expert": 3})
  with pytest.raises(ValueError, match=r"8 experts .* use 16 experts, or 8 devices"):
    check_experts(over, {"data": 4, "expert": 4})


@pytest.mark.parametrize(
  "changes, mesh, positions_cut, message",
  [
    (
      dict(**ROOMY),
      "sequence:4",
      False,
      r"groups of 8 .* do not divide the 4 .* group 4, or capac",
    ),
    (dict(**{**TIGHT, "group": 3}), "data:2", False, r"groups of 3 .* the 32 .* group 2 or 4, or"),
    (dict(**ROWWISE), "sequence:2", False, r"lies on 2 devices with 16 .* use group 4 or 8, or"),
    (dict(axes=("tensor",), **ROWWISE), "tensor:2", True, r"on 2 devices with 16 .* group 8 or 16"),
    (dict(axes=("tensor",)), "tensor:2", False, r"2 devices along tensor hold the same positions"),
    (dict(axes=("expert",)), "data:2", None, r"4 experts on each of 1 devices .* are not the 8"),
  ],
)
def test_what_a_mesh_cannot_hold_is_refused(float64, changes, mesh, positions_cut, message):
  kind = config(**changes)
  with pytest.raises(ValueError, match=message):
    if positions_cut is None:  # parameters that are cut over an axis which the layer does not know
      graph, params = nnx.graphdef(module(kind)), numbers(kind)[0]
      half = {name: p[:4] if p.ndim == 3 else p for name, p in params.items()}
      nnx.merge(graph, nnx.State(half))(jnp.ones((1, 8, D)))
    forward(kind, mesh, positions_cut)
