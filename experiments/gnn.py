"""GNNPipe: a deep graph network on the cross-references of Roget's Thesaurus, layers pipelined.

    ./launch/local.sh experiments/gnn.py

Which of six classes is a heading in, by its spelling and by the headings that it refers to? The
1,022 headings go through 8 layers on 4 CPU devices in 4 chunks, which know of each other what was a
step ago (see `jaxpipe/models/gnn.py`); `--microbatches=1` is the full graph, exactly. Half of the
headings train, the other half is measured. Expected on two cores: about 1 minute; README has the
accuracy that was seen. The largest class would give 0.23, and `--noedges`, where spelling is all
there is, 0.28. The same command resumes; `--help` lists the flags.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax

from jaxpipe.data.experiments.graph import split
from jaxpipe.data.experiments.roget import CLASSES, load_roget
from jaxpipe.models.gnn import GnnConfig, gnn
from jaxpipe.parallel.mesh import ROWS, parse_mesh
from jaxpipe.stack.forward import evaluate
from jaxpipe.training.command.task import Baseline, Task, TaskConfig
from jaxpipe.training.command.task_run import run_task
from jaxpipe.training.flags.settings import same

ROGET = pathlib.Path(__file__).resolve().parents[1] / "data" / "roget" / "roget_dat.txt.gz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GnnRun(TaskConfig):
  """The flags: those of every run, and the model's."""

  layers: int = same(8, "graph layers")
  width: int = same(64, "numbers that a node holds between layers")
  dropout: float = same(0.5, "share of what a layer takes that is dropped")
  edges: bool = same(True, "whether headings know those they refer to")


def build(config: GnnRun) -> Task:
  """Builds the task: the graph, the network and the result to compare it with."""
  sizes = parse_mesh(config.mesh)
  if any(sizes.get(axis, 1) > 1 for axis in ROWS):
    raise ValueError(f"--mesh={config.mesh} cuts a chunk; use stage alone and more --microbatches")
  graph = load_roget(ROGET)
  train, held_out = split(len(graph.labels), config.seed, train=0.5, held_out=0.5)
  known = dataclasses.replace(graph, edges=graph.edges[: None if config.edges else 0])
  batch, measured = (known.rows(config.batch_size, nodes) for nodes in (train, held_out))
  stack = gnn(
    GnnConfig(
      nodes=config.batch_size,
      features=graph.features.shape[1],
      classes=len(CLASSES),
      layers=config.layers,
      width=config.width,
      dropout=config.dropout,
    )
  )
  spread = graph.propagate_labels(train)[held_out] == graph.labels[held_out]
  return Task(
    stack=stack,
    batches=lambda step: batch,
    validation=[measured],
    summarize=lambda loss, metrics, weight: {"accuracy": float(metrics["correct"]) / weight},
    baseline=Baseline(name="labels spread along edges", metrics={"accuracy": float(spread.mean())}),
    finish=functools.partial(whole_graph, stack, measured),
    identity={"edges": len(known.edges), "nodes": len(graph.labels)},
    data_line=f"data: {len(graph.labels):,} headings, {len(known.edges):,} pairs of references",
  )


def whole_graph(stack: Any, batch: Any, params: Any, state: Any) -> str:
  """Measures the trained network on the whole graph at once, without chunks and history."""
  _, weight, metrics = jax.jit(functools.partial(evaluate, stack))(params, state, batch)
  return f"the whole graph at once, no history: accuracy {metrics['correct'] / weight:.4f}"


DEFAULTS = GnnRun(
  run_dir="runs/gnn",
  batch_size=1024,
  steps=150,
  learning_rate=3e-3,
  warmup_steps=20,
  validate_every=25,
  checkpoint_every=75,
)

if __name__ == "__main__":
  run_task(DEFAULTS, build)
