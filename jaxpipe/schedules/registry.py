"""The registry of schedules: one entry for each named family.

A new family is one function, which builds a schedule from a `Spec`, and one entry of `FAMILIES`.
Everything that is common to all families is done once, in `make_schedule`. The formulas here are
tested beside their families, and are the text of their sections in docs/schedules.md.
"""

import dataclasses
from collections.abc import Callable, Mapping

from jaxpipe.schedules.by_kind.alternating import one_f_one_b_by_kind
from jaxpipe.schedules.by_kind.loop import (
  eager_by_kind,
  gpipe_by_kind,
  interleaved_by_kind,
  looped_bfs_by_kind,
  zero_bubble_by_kind,
)
from jaxpipe.schedules.by_kind.v_placement import zb_v_by_kind
from jaxpipe.schedules.families.bitpipe import bitpipe
from jaxpipe.schedules.families.chimera import chimera
from jaxpipe.schedules.families.dualpipe import dualpipe
from jaxpipe.schedules.families.dualpipe_v import dualpipe_v
from jaxpipe.schedules.families.gpipe import gpipe
from jaxpipe.schedules.families.hanayo import hanayo
from jaxpipe.schedules.families.interleaved import eager_1f1b, interleaved_1f1b
from jaxpipe.schedules.families.looped_bfs import looped_bfs
from jaxpipe.schedules.families.one_f_one_b import one_f_one_b
from jaxpipe.schedules.families.skippipe import skippipe
from jaxpipe.schedules.families.v_shaped import v_half, v_min, v_zb
from jaxpipe.schedules.families.zb_auto import zb_auto
from jaxpipe.schedules.families.zb_v import zb_v
from jaxpipe.schedules.families.zero_bubble import zb_h1, zb_h2
from jaxpipe.schedules.families.zeropp import zeropp
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec


@dataclasses.dataclass(frozen=True)
class Family:
  """One named way of building schedules.

  Attributes:
    build: the function that makes a schedule, not yet checked.
    summary: one line about the family, for `--help` and tables.
    bubble: the published formula of its idle share, or measured idle time; over the makespan where
      nothing else is said.
    peak: the most chunks that a device holds, as text or a formula.
    use: when to choose it.
    chunks: number of stages per device, V, by default.
    any_chunks: whether other numbers of stages per device can be asked for.
    even_devices: whether the number of devices, P, must be even.
    even_chunks: whether V must be even.
    backward: what its builder makes of backward passes: `fused` (each a B), `split` (each an I and
      a W), or `mixed`.
    options: the arguments that only this family understands: name -> meaning.
    by_kind: the function that makes a schedule with its ticks by kind; None where there is none.
  """

  build: Callable[[Spec], Schedule]
  summary: str
  bubble: str
  peak: str
  use: str
  _: dataclasses.KW_ONLY
  chunks: int = 1
  any_chunks: bool = False
  even_devices: bool = False
  even_chunks: bool = False
  backward: str = "fused"
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)
  by_kind: Callable[[Spec], Schedule] | None = None

  def offers(self, chunks: int) -> bool:
    """Whether V chunks per device can be asked for; an odd V may still be refused, see `fits`."""
    return self.any_chunks or chunks == self.chunks

  def fits(self, devices: int, chunks: int) -> bool:
    """Whether the family has schedules for these sizes, whatever the number of microbatches.

    Args:
      devices: number of devices, P, 1 or more.
      chunks: number of stages per device, V, 1 or more.

    Returns:
      False where its builder refuses the sizes with a ValueError. Options, or a memory limit that
      is too low, may be refused for any sizes.

    >>> FAMILIES["hanayo"].fits(3, 4), FAMILIES["hanayo"].fits(3, 3), FAMILIES["gpipe"].fits(3, 2)
    (True, False, False)
    """
    even = not (self.even_devices and devices % 2) and not (self.even_chunks and chunks % 2)
    return even and self.offers(chunks)


# The order is that of `--list` and of tables: oldest first, relatives together.
FAMILIES: dict[str, Family] = {
  "gpipe": Family(
    gpipe,
    "all forwards, then all backwards",
    "(P-1) / (M+P-1)",
    "M",
    "few microbatches, or activations that are small because everything is recomputed; with M=1"
    " it is naive model parallelism",
    by_kind=gpipe_by_kind,
  ),
  "1f1b": Family(
    one_f_one_b,
    "one forward, one backward: at most P microbatches in flight",
    "(P-1) / (M+P-1)",
    "min(P-d, M) on device d",
    "the default: GPipe's bubble, and memory that does not grow with M",
    by_kind=one_f_one_b_by_kind,
  ),
  "eager-1f1b": Family(
    eager_1f1b,
    "1F1B with twice the warm-up, so that no neighbours do F beside B",
    "(P-1) / (M+P-1)",
    "min(2(P-d)-1, M) on device d",
    "one program on all devices, by ticks of one kind: 1F1B's ideal time in lock-step, for twice"
    " its activations",
    by_kind=eager_by_kind,
  ),
  "interleaved-1f1b": Family(
    interleaved_1f1b,
    "1F1B with V chunks per device: a V-th of the bubble",
    "(P-1) / (VM+P-1)",
    "VP+P-1 where P divides M, 1 + (P-1)/(PV) times 1F1B's activations; more in longer rounds",
    "few microbatches per device, links fast enough for V times the traffic",
    chunks=2,
    any_chunks=True,
    by_kind=interleaved_by_kind,
  ),
  "looped-bfs": Family(
    looped_bfs,
    "GPipe chunk by chunk: each chunk's weights once per step",
    "(P-1) / (VM+P-1)",
    "VM",
    "weights sharded over data replicas, which can then be gathered once per chunk and pass; the"
    " executor here gathers those of any schedule without G once a step",
    chunks=2,
    any_chunks=True,
    by_kind=looped_bfs_by_kind,
  ),
  "zb-h1": Family(
    zb_h1,
    "1F1B with late weight gradients, holding as many chunks",
    "(P-1)(F+I-W) idle with V=1, where W is no longer than F and I",
    "P with V=1",
    "1F1B's chunks with a third of its bubble, wherever layers can be split into I and W",
    any_chunks=True,
    backward="split",
    by_kind=zero_bubble_by_kind,
  ),
  "zb-h2": Family(
    zb_h2,
    "twice the warm-up and chunks of zb-h1, the shortest span",
    "(P-1)(F+I-2W) idle in the span; the makespan is no shorter than zb-h1's",
    "2P-1",
    "steps that follow each other without a barrier (`--post_validation`), which the executor"
    " does not run; a step that ends with a barrier is no shorter than zb-h1's",
    backward="split",
  ),
  "zb-auto": Family(
    zb_auto,
    "zero bubble planned for the given costs and memory limit",
    "planned: makespan never above that of the other one-chunk schedules that fit",
    "`--memory_limit`; up to M without one",
    "stages of unequal cost, or a memory limit between those of the drawn schedules",
    backward="split",
  ),
  "zb-v": Family(
    zb_v,
    "zero bubble with 1F1B's chunks, or any memory_limit, in a V",
    "0 in the span at equal times and M >= 2P",
    "2P half-size chunks, or `--memory_limit`",
    "F, I and W of similar length; every device holds equally much",
    chunks=2,
    backward="split",
    by_kind=zb_v_by_kind,
  ),
  "v-min": Family(
    v_min,
    "a V that holds about a third of 1F1B's chunks where P is large",
    "at most 4P-5 idle at equal times",
    "2 (floor((P+1)/3) + 1) half-size chunks",
    "memory is what limits, and F, I and W are of equal length",
    chunks=2,
    backward="split",
  ),
  "v-half": Family(
    v_half,
    "a V that holds P+2 half-size chunks where 1F1B holds 2P",
    "6P-3k-1 idle at equal times, k the peak",
    "P+2 (even P) or P+1 (odd P) half-size chunks",
    "fewer chunks than 1F1B, where F, I and W are of similar length; it saves fewer bytes than"
    " chunks (`docs/memory.md`)",
    chunks=2,
    backward="split",
  ),
  "v-zb": Family(
    v_zb,
    "a V without bubble that holds as many chunks as 1F1B",
    "0 in the span at equal times",
    "2P half-size chunks",
    "as zb-v, from the building block of v-min and v-half",
    chunks=2,
    backward="split",
  ),
  "hanayo": Family(
    hanayo,
    "waves down and up the devices, V/2 of them: ever smaller bubbles",
    "(2P-2) / (3PW+2P-2) at M = P, B = 2F and W waves, below the published (2P-2) / (3PW+P-1)",
    "bounded in M: measured 1.3 to 1.75 times PV",
    "small M and fast links; weights are held once",
    chunks=2,
    any_chunks=True,
    even_chunks=True,
    options={"waves": "number of waves, each 2 chunks per device"},
  ),
  "chimera": Family(
    chimera,
    "two opposite 1F1B pipelines on even P, weights held twice",
    "(P-2) / (2M+P-2) at B = F and M a multiple of P",
    "P/2+1 to P",
    "small M, and memory for two replicas of the weights",
    chunks=2,
    even_devices=True,
  ),
  "bitpipe": Family(
    bitpipe,
    "two opposite V-shaped pipelines on even P, weights twice",
    "(P-2) / (3M+P-2) at B = 2F and M = P",
    "about (3P+2)/2 to 2P half-size chunks at M = P",
    "as Chimera, with more traffic and a smaller bubble",
    chunks=4,
    even_devices=True,
  ),
  "dualpipe": Family(
    dualpipe,
    "opposite pipelines, forwards overlapped with backwards, even P",
    "(P/2-1)(FB + B - 3W) idle, FB an overlapped pair, M >= 2P",
    "P+1",
    "communication inside stages (experts) that a pair's other half can hide; the executor here"
    " runs the two halves one after the other",
    chunks=2,
    even_devices=True,
    backward="mixed",
  ),
  "dualpipe-v": Family(
    dualpipe_v,
    "DualPipe cut in half: overlapped pairs on one V, weights held once",
    "(P-1)(FB + B - 3W) idle, FB an overlapped pair, M >= 2P",
    "2P+1",
    "as DualPipe, without a second replica of the weights",
    chunks=2,
    backward="mixed",
  ),
  "zeropp": Family(
    zeropp,
    "chunk by chunk in units: few gathers of sharded weights",
    "never above looped-bfs with the default unit",
    "below VM where M > U; at most 2VU-1",
    "fully sharded weights: 2VM/U gathers per device and step, with fewer chunks than looped-bfs"
    " where M > U",
    chunks=2,
    any_chunks=True,
    backward="split",
    options={"unit": "microbatches per unit, U"},
  ),
  "skippipe": Family(
    skippipe,
    "paths that leave stages out, by search",
    "depends on the paths",
    "`--memory_limit`",
    "models that tolerate skipped stages, on devices of unequal speed",
    options={"visits": "stages on each path"},
  ),
}
