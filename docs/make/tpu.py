"""Writes docs/tpu.md: training steps compiled for TPUs that are not there.

    .venv/bin/pip install -e '.[tpu]'
    .venv/bin/python docs/make/tpu.py [NAME ...]

Runs experiments/compile_tpu.py once for each row and puts what it reports into a table. A row takes
about a minute, `auto` and the last two some minutes, and at most 8 GB of memory. Given names, it
runs those rows alone, and leaves the others as they stand on the page, if they are of the same
versions and commands.
"""

import importlib.metadata
import json
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "tpu.md"

SMALL = (
  "--topology=v5p:2x2x1 --mesh=stage:4 --layers=16 --width=1024 --heads=8 --kv_heads=8"
  " --mlp_width=0 --vocabulary_size=8192 --sequence_length=1024 --dtype=bfloat16"
)
MIDDLE = "--preset=gpipe-6b --topology=v5p:2x2x4 --mesh=stage:16 --microbatches=64 --batch_size=256"
LARGE = (
  "--preset=gpt3-175b --topology=v5p:4x4x3 --mesh=stage:48 --microbatches=192 --batch_size=192"
  " --residuals=full"
)
BY_KIND = "--schedule=interleaved-1f1b --ticks=kind --unroll=none"
ROWS = {
  "0.2B 1f1b": f"{SMALL} --schedule=1f1b --unroll=none",
  "0.2B 1f1b slack": f"{SMALL} --schedule=1f1b --unroll=none --slack=1",
  "0.2B 1f1b auto": f"{SMALL} --schedule=1f1b",
  "0.2B zb-h1": f"{SMALL} --schedule=zb-h1 --unroll=none",
  "0.2B head cut": f"{SMALL} --schedule=1f1b --head=sharded --unroll=none",
  "6.6B 1f1b": f"{MIDDLE} --schedule=1f1b --unroll=none",
  "6.6B 1f1b slack": f"{MIDDLE} --schedule=1f1b --unroll=none --slack=1",
  "6.6B 1f1b auto": f"{MIDDLE} --schedule=1f1b",
  "6.6B zb-h1": f"{MIDDLE} --schedule=zb-h1 --unroll=none",
  "6.6B V=4 by kind": f"{MIDDLE} {BY_KIND} --chunks=4",
  "175B 1f1b": f"{LARGE} --schedule=1f1b --unroll=none",
  "175B V=2 by kind": f"{LARGE} {BY_KIND} --chunks=2",
  "1T tensor": "--preset=megatron-1t --unroll=none",
  "1T V=2 by kind": f"--preset=megatron-1t {BY_KIND} --chunks=2",
  "733B experts": "--preset=deepseek-v3",
  "733B V=4 by kind": f"--preset=deepseek-v3 {BY_KIND} --chunks=4",
}

TEXT = """# Training steps compiled for TPUs

No TPU was used and no step was run: on a machine with CPUs only, libtpu compiles the training step
for a topology (`experiments/compile_tpu.py`), and figures are read from its program. jax {jax},
libtpu {libtpu}. Written by `.venv/bin/python docs/make/tpu.py`.

{table}

- GB of one device. *Predicted* is what `jaxpipe.memory_report` says before compiling; *compiler* is
  what the compiled program holds altogether; the chip has {chip}. Predictions are for one loop: in
  straight lines (`auto`) the compiler keeps more values of several ticks at a time.
- *Ring copies*: copies of whole rings inside a loop or branch, which must be 0. *Moves*: small
  rings that the compiler takes into vector memory and back.
- *Transfers*: how many are asynchronous, of all, and how many of all are inside a conditional.
- *Hidden*: estimated cycles of what runs between the start and the end of a transfer, on a device
  that has the most to do there; the least of all transfers. `--slack=1` sends what the tick before
  made, beside this tick's action; in a straight line the least is that of a tick without work.
- *F*, *B*, *I*, *W*: million cycles of one action of one stage. *Step* and *MFU* are what they
  imply, by the compiler's estimates alone: the clock is the documented peak over the documented
  matrix units, devices wait for their neighbours every tick, and a transfer takes no time.
  Branches that belong to no action are not in them. They are known only where all ticks are turns
  of one loop.

*By kind* is interleaved 1F1B with [ticks of one kind](schedules.md#ticks-by-kind), which needs 0.60
to 0.73 of the estimated time of 1F1B in one loop. That of 175B holds more than the chip has, by the
compiler, and that of 733B copies a ring.

The rows of 1T and 733B are compiled for 1,024 chips: a model of Megatron-LM's largest shape over
stage:64, data:2 and tensor:8, with positions cut over `tensor`; and one of DeepSeek-V3's shape
(experts in all of 64 layers, grouped heads in place of its latent attention) over stage:16,
fsdp:2 and expert:32.

The rows:

{commands}
"""
HEAD = (
  *("", "parameters", "P", "M", "compile s", "predicted", "compiler", "ring copies", "moves"),
  *("transfers", "hidden", "F", "B", "I", "W", "step s", "MFU"),
)


def main() -> None:
  """Compiles every row, and writes the page."""
  chosen = sys.argv[1:] or list(ROWS)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
  reports = {name: compile_row(ROWS[name]) for name in chosen}
  rows = old_rows(versions) | {name: cells(name, report) for name, report in reports.items()}
  table = [HEAD, ("---",) * len(HEAD), *(rows[name] for name in ROWS if name in rows)]
  commands = [command(name) for name in ROWS if name in rows]
  text = TEXT.format(
    **versions,
    chip=", ".join(sorted({f"{r['memory']['chip'] / 1e9:g}" for r in reports.values()})),
    table="\n".join(f"| {' | '.join(row)} |" for row in table),
    commands="".join(commands).rstrip("\n"),
  )
  OUT.write_text(text)


def old_rows(versions: dict[str, str]) -> dict[str, tuple[str, ...]]:
  """Returns the rows that are on the page, by name; none where it is of other versions."""
  page = OUT.read_text() if OUT.exists() else ""
  if "jax {jax},\nlibtpu {libtpu}.".format(**versions) not in page:
    return {}
  lines = [line for line in page.splitlines() if line.startswith("| ")]
  found = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
  return {row[0]: row for row in found if row[0] in ROWS and command(row[0]) in page}


def command(name: str) -> str:
  """Returns the line of the page that shows a row's flags."""
  return f"    {name:16} {' '.join(ROWS[name].split())}\n"


def compile_row(flags: str) -> dict[str, Any]:
  """Compiles a step with such flags and returns the command's report."""
  script = str(ROOT / "experiments" / "compile_tpu.py")
  command = [sys.executable, script, *flags.split(), "--format=json"]
  report: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=-1).stdout)
  return report


def cells(name: str, report: dict[str, Any]) -> tuple[str, ...]:
  """Returns the cells of a row, in the order of `HEAD`."""
  memory, permutes = report["memory"], report["permutes"]
  moves = sum(copy["moved"] for copy in report["ring_copies"])
  inside = sum(permute["conditional"] is not None for permute in permutes)
  hidden = min((permute["hidden_cycles"][1] for permute in permutes), default=0)
  cycles = {kind: cost["most"] / 1e6 for kind, cost in report["cycles"].items()}
  estimate = report["estimate"]
  return (
    name,
    f"{report['parameters'] / 1e9:.2f}B",
    report["mesh"].removeprefix("stage:"),
    str(report["microbatches"]),
    f"{report['compile_seconds']:.0f}",
    f"{sum(memory['predicted'].values()) / 1e9:.2f}",
    f"{memory['compiler']['total'] / 1e9:.2f}",
    str(len(report["ring_copies"]) - moves),
    str(moves),
    f"{sum(p['asynchronous'] for p in permutes)} of {len(permutes)}, {inside} inside",
    f"{hidden:,}",
    *(f"{cycles[kind]:.2f}" if kind in cycles else "" for kind in "FBIW"),
    f"{estimate['step_seconds']:.3g}" if estimate else "",
    f"{estimate['mfu']:.1%}" if estimate else "",
  )


if __name__ == "__main__":
  main()
