"""Every way to make eight devices of the six axes, against the model on one, leaf by leaf."""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from networks import lm
from networks.drawn import drawn

import jaxpipe
from jaxpipe.models.transformer.moe import MoeConfig
from jaxpipe.parallel.mesh import AXES, EXPERT, ROWS, SEQUENCE, TENSOR

DEVICES = 8
SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-v", "chimera")


def factorizations(n: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
  """All sizes of the axes that multiply to n."""
  if len(axes) == 1:
    yield {axes[0]: n}
    return
  for size in (d for d in range(1, n + 1) if n % d == 0):
    for rest in factorizations(n // size, axes[1:]):
      yield {axes[0]: size, **rest}


CASES = [
  pytest.param(
    i, sizes, name, id=f"{','.join(f'{a}:{k}' for a, k in sizes.items() if k > 1)}-{name}"
  )
  for i, (sizes, name) in enumerate(
    (sizes, name) for sizes in factorizations(DEVICES, AXES) for name in SCHEDULES
  )
]


def experts(i: int, sizes: dict[str, int]) -> MoeConfig | None:
  """For every mesh with `expert`, over other axes besides; whole for every third of the others."""
  cut = sizes[TENSOR] > 1 and _positions_cut(i)
  last = (EXPERT, TENSOR) if cut else ("data", EXPERT)
  over = ((EXPERT,), (EXPERT, SEQUENCE), last)[i % 3]
  if sizes[EXPERT] == 1 and i % 3:
    return None
  # With a capacity that not all tokens fit; one position is a run on every mesh.
  capacity = dict(capacity_factor=0.75, group=1) if i % 2 else dict(capacity_factor=0, group=0)
  return MoeConfig(experts=8, top_k=2, balance=0.1, z=0.01, axes=over, **capacity)


def _positions_cut(i: int) -> bool:
  return i % 4 < 2


def stack(i: int, sizes: dict[str, int], **changes) -> jaxpipe.LayerStack:
  """A model that every mesh can cut, its options another choice for every case."""
  few = DEVICES if sizes[TENSOR] * sizes[SEQUENCE] > 1 else 4
  # `ulysses` must divide both the heads that are left and the devices along `sequence`.
  ulysses = min(math.gcd(few // sizes[TENSOR], sizes[SEQUENCE]), (1, 2, 8)[i % 3])
  shape = dict(width=4 * few, heads=few, kv_heads=max(sizes[TENSOR], few // 2), mlp_width=8)
  options = dict(
    positions_cut=_positions_cut(i), ulysses=ulysses, logits_chunk=(0, 1)[i % 2], tied=i % 5 > 1
  )
  layers, moe = 2 * sizes["stage"], experts(i, sizes)
  kind = ({}, lm.QWEN2, lm.QWEN3, {} if moe else lm.GPT2)[i % 4]
  return lm.stack(layers, **shape, **options, **kind, moe=moe, **changes)


def run(i: int, sizes: dict[str, int], name: str, **changes) -> None:
  if name == "chimera" and sizes["stage"] % 2:
    name = "interleaved-1f1b"  # a pipeline in two directions needs an even number of devices
  schedule = jaxpipe.make_schedule(name, devices=sizes["stage"], microbatches=4)
  shards = math.prod(sizes[axis] for axis in ROWS)
  length = 2 * sizes[SEQUENCE] * sizes[TENSOR] if sizes[SEQUENCE] * sizes[TENSOR] > 1 else 4
  model = stack(i, sizes, **changes)
  report = jaxpipe.check(
    model,
    schedule,
    jaxpipe.make_mesh(sizes),
    lm.batch(4 * shards, length),
    params=drawn(model),
    residuals=("dots", "full", "all")[i % 3],
    unroll="none",
  )
  assert report.ok, report


@pytest.mark.parametrize(
  "mesh, schedule, changes",
  [
    ("stage:2,sequence:2,tensor:2", "zb-h1", dict(**lm.GPT2, positions_cut=True, ulysses=2)),
    pytest.param(
      "stage:2,sequence:2,tensor:2",
      "1f1b",
      dict(**lm.QWEN2, **lm.QWEN3, logits_chunk=2),
      marks=pytest.mark.smoke,
    ),
    pytest.param(
      "stage:2,fsdp:2,expert:2",
      "zeropp",
      dict(experts=("expert",)),
      marks=pytest.mark.smoke,
    ),
    ("stage:2,sequence:4", "1f1b", dict(experts=("sequence",))),
  ],
)
def test_meshes_of_every_axis(float64, mesh, schedule, changes):
  changes = dict(changes)
  if axes := changes.pop("experts", None):
    changes["moe"] = MoeConfig(
      experts=4, top_k=2, capacity_factor=0, group=0, balance=0.1, z=0.01, axes=axes
    )
  plan = jaxpipe.make_schedule(schedule, devices=2, microbatches=4)
  stack = lm.stack(plan.stages, width=16, heads=4, kv_heads=2, mlp_width=16, **changes)
  batch = {**lm.batch(16, 8), "segments": np.arange(8)[None].repeat(16, 0) // 5}
  on = jaxpipe.make_mesh(mesh)
  report = jaxpipe.check(stack, plan, on, batch, params=drawn(stack), unroll="none")
  assert report.ok, report


def test_a_vocabulary_over_stages_beside_cut_weights_rows_and_positions(float64):
  stack = lm.stack(2, width=16, heads=4, kv_heads=2, mlp_width=16, ulysses=2)
  plan = jaxpipe.make_schedule("1f1b", devices=2, microbatches=4, head="sharded")
  mesh = jaxpipe.make_mesh("stage:2,fsdp:2,sequence:2")
  options = dict(params=drawn(stack), unroll="none")
  report = jaxpipe.check(stack, plan, mesh, lm.batch(16, 8), **options)
  assert report.ok, report


@pytest.mark.sampled(
  "mesh, schedule, moe",
  [("stage:2,sequence:2,tensor:2", "1f1b", False), ("stage:2,fsdp:2,expert:2", "zeropp", True)],
  1,
)
def test_evaluation_on_a_mesh_is_that_of_one_device(float64, mesh, schedule, moe):
  """Its program has forwards only: of what W reads, nothing is known."""
  options = dict(experts=4, top_k=2, capacity_factor=0, group=0, balance=0.1, z=0.01)
  shape = dict(width=16, heads=4, kv_heads=2, mlp_width=16, dropout=0.0)
  plan, on = jaxpipe.make_schedule(schedule, devices=2, microbatches=4), jaxpipe.make_mesh(mesh)
  stack = lm.stack(plan.stages, **shape, moe=MoeConfig(**options) if moe else None)
  batch = lm.batch(16, 8)
  params = drawn(stack)
  (want, metrics), _ = jaxpipe.reference_value_and_grad(stack, 4)(params, batch)
  placed = jaxpipe.place(params, stack, plan, on)
  loss, found = jaxpipe.pipeline_forward(stack, plan, on)(placed, batch)
  assert abs(loss - want) < 1e-12
  assert all(abs(found[name] - metrics[name]) < 1e-12 for name in metrics)


@pytest.mark.slow
@pytest.mark.sampled("i, sizes, name", CASES, 2)
def test_every_mesh_gives_the_gradients_of_one_device(float64, i, sizes, name):
  run(i, sizes, name)


@pytest.mark.slow
@pytest.mark.sampled("i, sizes, name", CASES, 1)
def test_every_mesh_in_float32(i, sizes, name):
  run(i, sizes, name, dtype=jnp.float32, param_dtype=jnp.float32)
