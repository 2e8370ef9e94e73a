"""Looped BFS: chunk by chunk, all microbatches each (Lamy-Poirier, 2022, arXiv:2211.05953).

P=2, V=2, M=2, with a backward that takes as long as two forwards:

  device 0 | 0F0 0F1 2F0 2F1             2B1---- 2B0---- 0B1---- 0B0---- | peak 4
  device 1 |     1F0 1F1 3F0 3F1 3B1---- 3B0---- 1B1---- 1B0----         | peak 4

The order of GPipe, with the loop over layers outside the loop over microbatches. With one layer per
stage, V being the layers of a device, it is layered gradient accumulation with modular pipeline
parallelism (Lamy-Poirier, 2021, arXiv:2106.02679): all microbatches of a layer are neighbours, so
its weights are gathered, and its gradients reduced, once per step and not once per microbatch.

The bubble is interleaved 1F1B's, (P-1) / (VM+P-1) for M of at least P, and every device holds all
VM chunks. Backwards run last to first, as in PyTorch.
"""

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


def looped_bfs(spec: Spec) -> Schedule:
  """Builds looped BFS: all forwards breadth first, then all backwards in the opposite order.

  Args:
    spec: devices, microbatches and chunks, any numbers of them.

  Returns:
    The schedule, its backward fused.
  """
  M = spec.microbatches
  placement = Placement.loop(spec.devices, spec.chunks)
  # Chunks outside, microbatches inside: each chunk's weights are needed in one run per pass.
  order = tuple(
    tuple(Action(s, Kind.F, m) for s in stages for m in range(M))
    + tuple(Action(s, Kind.B, m) for s in stages[::-1] for m in reversed(range(M)))
    for stages in placement.table
  )
  return Schedule("looped-bfs", placement, M, order)
