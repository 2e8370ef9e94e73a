"""BitPipe: two V-shaped pipelines in opposite directions (Wu et al., 2024, arXiv:2410.19367).

Chimera with two chunks per direction: the model goes down the devices and up again in one replica,
up and down in the other. P=2, M=2, with a backward that takes as long as two forwards:

  device 0 | 0F0 1F1 2F1 3F0 3B0---- 2B1---- 1B1---- 0B0---- | peak 4
  device 1 | 0F1 1F0 2F0 3F1 3B1---- 2B0---- 1B0---- 0B1---- | peak 4

Each direction follows the plan of Hanayo's wave, with half of the microbatches: microbatch j enters
stage s at s + 2j, and backwards run at half that speed. A unit of P microbatches takes 8P-4 units
of time, of which a device works 6P, so with M = P the bubble is (P-2) / (3M+P-2). Devices hold
from about (3P+2)/4 to P microbatches, in two chunks each. A stage's replicas need their gradients
summed, and twice the weights; the turns of a V stay on their device.

More microbatches are dealt to rounds of about P, each planned to begin when a device could have
ended the work of those before it. What a device idles and holds does not grow with M then; measured
for multiples of P from 2P to 8P:

  P                  2    4    6    8   16
  forwards idle      0    4    9   16   35    2P-4 would be the formula's
  chunks held        4    9   15   22   45    at most; with M = P it is 2P

A memory limit is kept while planning, and costs time.
"""

from jaxpipe.schedules.families.hanayo import wave_urgency
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.planning.directions import directed_work, index
from jaxpipe.schedules.planning.fused_list import fused_list_schedule
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


def bitpipe(spec: Spec) -> Schedule:
  """Builds BitPipe: two waves towards each other, planned as F and B for the given costs.

  Args:
    spec: devices, an even number, and microbatches, any number.

  Returns:
    The schedule, its backward fused.

  Raises:
    ScheduleError: the number of devices is odd.
    ValueError: the memory limit is too low for one microbatch.
  """
  P, M = spec.devices, spec.microbatches
  placement = Placement.mirrored(P, 4)
  # Either direction; of an odd number, that which has one more.
  places = _places((M + 1) // 2, P // 2)
  urgency = wave_urgency(placement.stages, [places[index(m)] for m in range(M)])
  work = directed_work(placement, M)
  # Waiting keeps the plan of a single round; between rounds it would delay all that follow.
  order = fused_list_schedule(placement, work, spec, urgency, wait=M <= P)
  return Schedule("bitpipe", placement, M, order)


def _places(count: int, size: int) -> list[tuple[int, int]]:
  """Deals microbatches evenly to rounds of about `size`.

  Returns:
    For each microbatch, the time at which its round begins and its number in the round. Times are
    in halves of a forward, of which a device works 24 for one microbatch each way.
  """
  rounds = max(1, (2 * count + size) // (2 * size))
  least, longer = divmod(count, rounds)
  places: list[tuple[int, int]] = []
  for r in range(rounds):
    begin = 24 * len(places)
    places += [(begin, j) for j in range(least + (r < longer))]
  return places
