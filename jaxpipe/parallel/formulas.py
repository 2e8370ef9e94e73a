"""Published formulas for the bytes that a cut network sends and keeps, to check programs against.

`docs/make/parallelism.py` and `tests/parallel/test_communication.py` count collectives in compiled
programs and compare their bytes with these. All results are bytes of one device, for one microbatch
and one layer where nothing else is said; what a collective sends is that of a ring. Arguments that
several functions take, with the letters of the papers:

    b  rows of a microbatch on this device     t         devices along `tensor`
    s  positions of a row                      c         devices along `sequence`
    h  model width                             itemsize  bytes of an element: 2 for bfloat16
    a  attention heads

References:
  Thakur, Rabenseifner and Gropp, 2005, Optimization of Collective Communication Operations in
    MPICH, IJHPCA 19(1): rings.
  Shoeybi et al., 2019, Megatron-LM, arXiv 1909.08053; Narayanan et al., 2021, Efficient Large-Scale
    Language Model Training on GPU Clusters, arXiv 2104.04473: tensor and pipeline parallelism.
  Korthikanti et al., 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv
    2205.05198: sequence parallelism along `tensor`, and what is kept.
  Liu, Zaharia and Abbeel, 2023, Ring Attention with Blockwise Transformers, arXiv 2310.01889.
  Jacobs et al., 2023, DeepSpeed Ulysses, arXiv 2309.14509.
  Rajbhandari et al., 2020, ZeRO, arXiv 1910.02054; Zhao et al., 2023, PyTorch FSDP, arXiv
    2304.11277.
  Lepikhin et al., 2020, GShard, arXiv 2006.16668: experts.
"""

from __future__ import annotations

# A device of a ring of g sends this many times (g - 1) / g of the whole array, which is what a
# gather makes and what a scatter takes.
RINGS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}


def ring(kind: str, array: float, group: int) -> float:
  """Returns the bytes that a device sends in a collective over a ring.

  Args:
    kind: a key of `RINGS`.
    array: bytes of the whole array: a gather's output, a scatter's input.
    group: devices in the ring.
  """
  return RINGS[kind] * array * (group - 1) / group


def tensor(b: int, s: int, h: int, t: int, itemsize: int = 2) -> float:
  """Returns the bytes of a layer cut by Megatron, forward and backward: four all-reduces of x.

  One follows attention and one the MLP; in the backward pass, one precedes each.
  """
  return 4 * ring("all-reduce", b * s * h * itemsize, t)


def tensor_sequence(
  b: int, s: int, h: int, t: int, itemsize: int = 2, *, repeated: int = 0
) -> float:
  """Returns the bytes of a layer cut by Megatron whose norms and dropout are cut by positions.

  Four all-gathers and four reduce-scatters of x: together as much as four all-reduces.

  Args:
    repeated: number of the forward's gathers that the backward does again because the gathered x
      was not kept; 2 in the paper, before attention and before the MLP.
  """
  x = b * s * h * itemsize
  return (4 + repeated) * ring("all-gather", x, t) + 4 * ring("reduce-scatter", x, t)


def ring_attention(b: int, s: int, kv: int, c: int, itemsize: int = 2) -> float:
  """Returns the bytes of ring attention's forward: keys and values visit all other devices.

  Args:
    kv: width of the keys, which is that of the values: heads of them times the head width.
  """
  return 2 * (c - 1) * b * (s / c) * kv * itemsize


def ulysses(b: int, s: int, h: int, c: int, itemsize: int = 2, *, kv: int | None = None) -> float:
  """Returns the bytes of Ulysses' forward: four all-to-alls.

  They are of queries, keys, values and of what attention makes of them.

  Args:
    kv: width of the keys and of the values; default h.
  """
  each = b * (s / c) * itemsize
  return sum(ring("all-to-all", each * width, c) for width in (h, kv or h, kv or h, h))


def fsdp(
  parameters: int, devices: int, *, gathers: int, scatters: int, itemsize: int = 2, sums: int = 4
) -> float:
  """Returns the bytes of gathering weights before they are used and scattering their gradients.

  Args:
    parameters: number of elements that all devices hold together.
    devices: devices along `fsdp`.
    gathers, scatters: how often each is done: 2 and 1 for every microbatch in ZeRO-3, where the
      weights are dropped between forward and backward.
    itemsize: bytes of an element of a weight.
    sums: bytes of an element of a gradient sum.
  """
  gathered = gathers * ring("all-gather", parameters * itemsize, devices)
  return gathered + scatters * ring("reduce-scatter", parameters * sums, devices)


def data(parameters: int, devices: int, itemsize: int = 4) -> float:
  """Returns the bytes of adding gradients over data-parallel copies, once a step.

  Args:
    parameters: number of elements of one copy.
    devices: number of copies.
    itemsize: bytes of an element of a gradient.
  """
  return ring("all-reduce", parameters * itemsize, devices)


def experts(slots: int, h: int, devices: int, itemsize: int = 2) -> float:
  """Returns the bytes of a layer of experts: two all-to-alls forward and two backward.

  Args:
    slots: rows that this device sends, all experts together: capacity times experts.
    devices: devices along `expert`.
  """
  return 4 * ring("all-to-all", slots * h * itemsize, devices)


def hop(b: int, s: int, h: int, itemsize: int = 2) -> int:
  """Returns the bytes of one hop, stage to stage in one direction: x, or its gradient.

  Elsewhere `hop` is the latency of such a transfer.
  """
  return b * s * h * itemsize


def kept(
  b: int, s: int, h: int, a: int, t: int = 1, *, sequence: bool = False, scores: bool = True
) -> float:
  """Returns the bytes that a layer keeps from its forward for its backward, two for an element.

  The layer is GPT's: an MLP of 4 h, dropout with masks of one byte.

      sbh (34 + 5as/h)              t = 1
      sbh (10 + 24/t + 5as/(ht))    tensor
      sbh (34/t + 5as/(ht))         tensor, sequence
      sbh (34/t)                    tensor, sequence, no scores

  Args:
    sequence: whether norms and dropout are cut by positions over `tensor`.
    scores: whether softmax, its dropout and the scores are kept, and not computed again.
  """
  whole = 34 / t if sequence else 10 + 24 / t
  return s * b * h * (whole + (5 * a * s / (h * t) if scores else 0))
