"""A partition: which run of layers is which stage, and the costs of the stages that follow."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.partition.layer import LayerCost, total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
  """A list of layers cut into stages.

  Attributes:
    layers: the L layers in model order.
    sizes: S numbers of layers, by stage; their sum is L.
    method: name of the rule or search that chose the sizes.
  """

  layers: tuple[LayerCost, ...]
  sizes: tuple[int, ...]
  method: str = "given"

  def __post_init__(self) -> None:
    # Lists are welcome, but a frozen value must be hashable.
    object.__setattr__(self, "layers", tuple(self.layers))
    object.__setattr__(self, "sizes", tuple(self.sizes))
    if not self.sizes or min(self.sizes) < 0:
      raise ValueError(f"sizes={list(self.sizes)} are no stages; give each 0 layers or more")
    if sum(self.sizes) != len(self.layers):
      raise ValueError(
        f"sizes={list(self.sizes)} are {sum(self.sizes)} layers, the model has {len(self.layers)};"
        f" give sizes that sum to {len(self.layers)}"
      )

  @functools.cached_property
  def boundaries(self) -> tuple[int, ...]:
    """S+1 numbers: stage s is layers `boundaries[s]` up to, without it, `boundaries[s+1]`."""
    return tuple(itertools.accumulate(self.sizes, initial=0))

  @functools.cached_property
  def stages(self) -> tuple[LayerCost, ...]:
    """The costs of the S stages; a stage without layers sends its input on."""
    found: list[LayerCost] = []
    for start, end in itertools.pairwise(self.boundaries):
      stage = total(self.layers[start:end], f"layers {start} to {end - 1}")
      if start == end:
        output = found[-1].output if found else 0
        stage = dataclasses.replace(stage, name="no layers", output=output)
      found.append(stage)
    return tuple(found)

  @property
  def imbalance(self) -> float:
    """Time of the slowest stage over the mean stage's: 1 is perfect."""
    times = [stage.time for stage in self.stages]
    return max(times) * len(times) / sum(times) if sum(times) else 1.0

  def costs(self, hop: float = 0) -> Costs:
    """Returns the durations as the simulator takes them, one per stage and pass."""
    return Costs(
      [stage.forward for stage in self.stages],
      [stage.input_grad for stage in self.stages],
      [stage.weight_grad for stage in self.stages],
      hop,
    )

  @property
  def memory(self) -> Memory:
    """Changes of the memory that a device holds: F adds its stage's activations, W frees them."""
    held = [stage.activations for stage in self.stages]
    return held, 0, [-x for x in held]

  def __str__(self) -> str:
    """The stages as a table, and their imbalance."""
    head = ("stage", "layers", "forward", "input grad", "weight grad", "time", "parameters")
    rows: list[tuple[str, ...]] = [(*head, "activations", "output")]
    for s, (size, stage) in enumerate(zip(self.sizes, self.stages, strict=True)):
      start = self.boundaries[s]
      span = f"{start}-{start + size - 1}" if size else "none"
      values = (stage.forward, stage.input_grad, stage.weight_grad, stage.time)
      sizes = (stage.parameters, stage.activations, stage.output)
      rows.append((str(s), span, *(f"{x:.6g}" for x in (*values, *sizes))))
    title = f"{self.method}: {len(self.layers)} layers in {len(self.sizes)} stages"
    return "\n".join([f"{title}, largest / mean stage {self.imbalance:.3f}", *aligned(rows)])


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
  """Returns the rows of a table as lines of text, columns aligned to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ["  ".join(map(str.rjust, row, widths)) for row in rows]
