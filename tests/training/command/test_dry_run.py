"""What a run will cost, before it runs."""

from collections.abc import Callable
from pathlib import Path

import jax

from jaxpipe.training.command.dry_run import count_traffic, dry_run, place_lines
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.run import build_run


def test_it_names_places_memory_bubbles_and_traffic_and_writes_nothing(
  tiny: Callable[..., Config], tmp_path: Path
) -> None:
  setup = build_run(tiny(mesh="stage:2,fsdp:2,tensor:2", kv_heads=2, batch_size=8))
  text = dry_run(setup)
  for part in (
    "mesh: stage 2 x fsdp 2 x tensor 2 = 8 devices (cpu)",
    "span bubble",
    "expected memory of each device",
    "optimizer",
    # 4 layers over 2 stages, 16 inputs over fsdp, 16 outputs over tensor, 4 bytes each
    "layers/query/kernel",
    "[4, 16, 16] -> [2, 8, 8]",
    "512 B  (stage, fsdp, tensor)",
  ):
    assert part in text, part
  assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]


def test_every_parameter_has_a_line_with_its_bytes(tiny: Callable[..., Config]) -> None:
  setup = build_run(tiny(mesh="stage:2,data:2", batch_size=8))
  lines = list(place_lines(setup))
  assert len(lines) == len(jax.tree.leaves(setup.stack.param_shapes()))
  total = sum(int(line.split(" B")[0].split()[-1].replace(",", "")) for line in lines)
  assert total == setup.memory.bytes["parameters"]


def test_traffic_of_the_whole_step_includes_the_optimizer(tiny: Callable[..., Config]) -> None:
  """Its global norm is a sum over the axes that cut parameters."""
  sent = count_traffic(build_run(tiny(mesh="stage:2,tensor:2", kv_heads=2)))
  axes = {axes for axes, kind in sent.sums() if kind == "all-reduce"}
  assert any("tensor" in one for one in axes) and any("stage" in one for one in axes)
