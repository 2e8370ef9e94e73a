"""What every test runs under: eight CPU devices, strict arithmetic, and grids sampled by a seed.

A grid (schedule x P x M x ...) is too large to run whole every time. `@pytest.mark.sampled` and
the `sample_grid` fixture run a sample of it, another one each run; the seed is printed at the
start, `--grid-seed` repeats it, and `--whole-grid` runs every case.
"""

import gc
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pytest

# Makes test data with packages that tests do without.
collect_ignore = ["data/huggingface/make.py"]

Case = TypeVar("Case")

DEVICES = 8
SEED = "JAXPIPE_GRID_SEED"  # how the seed reaches the workers
caches = ""  # the folder of caches that this process made, and removes


def pytest_addoption(parser: pytest.Parser) -> None:
  group = parser.getgroup("grids")
  group.addoption("--grid-seed", type=int, help="repeat the samples of the run that printed it")
  group.addoption("--whole-grid", action="store_true", help="run every case of every grid")


def pytest_configure(config: pytest.Config) -> None:
  # A shell that starts something in the background has it ignore Ctrl-C, and so would all that the
  # tests start: those about Ctrl-C want the ordinary state.
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  # Read once, when JAX makes its devices: so before anything imports it. Programs that tests start
  # inherit all of it.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  # LLVM's optimizations are half of what a test of a small program costs. XLA's own passes, on
  # which buffers and the order of sums depend, all run. (Its older emitter of fusions,
  # `--xla_cpu_use_fusion_emitters=false`, would halve the rest, and computes wrong gradients:
  # `tests/pipeline/test_networks.py -k segmentation-chimera-2-True --whole-grid`.)
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      f"--xla_force_host_platform_device_count={DEVICES}",
      "--xla_backend_optimization_level=0",
    ]
  )
  # A program that was compiled once in this run of the tests, by a worker or by a process that a
  # test started, is not compiled again in it. The key is the program's text with the flags, so a
  # change of the code finds nothing of what was before it. Training runs keep theirs, and their
  # tokens, in the same folder rather than in the user's.
  if not hasattr(config, "workerinput"):
    global caches
    caches = tempfile.mkdtemp(prefix="jaxpipe-tests-")
    os.environ["XDG_CACHE_HOME"] = caches
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(caches, "jaxpipe", "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

  import jax

  # A conftest of a folder that was asked for may have imported it already.
  jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  # Broadcasting over a missing dim hides transposed arguments.
  jax.config.update("jax_numpy_rank_promotion", "raise")
  # The collector goes over millions of objects that JAX caches. Most garbage is freed without it.
  gc.set_threshold(20_000, 20, 50)
  # Drawn once, by the process that xdist starts its workers from, and theirs by inheritance: all
  # of them must collect the same tests.
  if not hasattr(config, "workerinput"):
    seed = config.option.grid_seed
    os.environ[SEED] = str(random.SystemRandom().randrange(2**32) if seed is None else seed)


def pytest_unconfigure() -> None:
  if caches:
    shutil.rmtree(caches, ignore_errors=True)


def _grids(config: pytest.Config) -> str:
  if config.option.whole_grid:
    return "grids: whole"
  return f"grids: sampled, repeat with --grid-seed={os.environ[SEED]}"


def pytest_report_header(config: pytest.Config) -> str:
  return _grids(config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
    terminalreporter.write_line(_grids(terminalreporter.config))


def _sample(config: pytest.Config, where: str, cases: Sequence[Case], count: int) -> list[Case]:
  """Returns `count` of the cases in their order, chosen by the seed and by who asks."""
  if config.option.whole_grid or count >= len(cases):
    return list(cases)
  draw = random.Random(f"{os.environ[SEED]} {where}")
  return [cases[i] for i in sorted(draw.sample(range(len(cases)), count))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
  """Parametrizes a test over a sample: `@pytest.mark.sampled("p, m", CASES, 6)`."""
  for marker in metafunc.definition.iter_markers("sampled"):
    names, cases, count = marker.args
    chosen = _sample(metafunc.config, metafunc.definition.nodeid, list(cases), count)
    metafunc.parametrize(names, chosen, **marker.kwargs)


@pytest.fixture
def sample_grid(request: pytest.FixtureRequest) -> Callable[[Sequence[Case], int], list[Case]]:
  """`sample_grid(cases, count)` inside one test: another sample at every call and every run."""
  calls = 0

  def sample(cases: Sequence[Case], count: int) -> list[Case]:
    nonlocal calls
    calls += 1
    return _sample(request.config, f"{request.node.nodeid} {calls}", cases, count)

  return sample


@pytest.fixture
def float64() -> Iterator[None]:
  """Double precision for one test; elsewhere the suite runs in JAX's default."""
  import jax

  before = jax.config.jax_enable_x64
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", before)
