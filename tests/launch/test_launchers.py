"""What each launcher would do, shown by its dry run, which touches nothing."""

import pathlib
import re
import shlex
import subprocess
from typing import Any

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPT = "experiments/lm.py"
HERE, TWO = "127.0.0.1", "--num_processes=2"


def launch(name: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
  # A PATH with no program in it but the shell's own tools: nothing could be installed or called.
  return subprocess.run(
    ["bash", LAUNCH / name, *args],
    cwd=LAUNCH.parent,
    env={"PATH": "/usr/bin:/bin", **env},
    text=True,
    capture_output=True,
    timeout=30,
    check=False,
  )


def planned(name: str, *args: str, **env: str) -> list[list[str]]:
  """The commands of a dry run, as words."""
  done = launch(name, *args, **env)
  assert (done.returncode, done.stderr) == (0, "")
  return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]


def test_local_shows_every_process() -> None:
  args = ("--devices=8", "--processes=2", "--dry_run", SCRIPT, "--steps=3")
  lines = planned("local.sh", *args)
  assert [line[:2] for line in lines] == [
    ["JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=4"]
  ] * 2
  assert [line[2:] for line in lines] == [
    ["python", SCRIPT, "--steps=3", f"--coordinator={HERE}:PORT", f"--process_id={i}", TWO]
    for i in range(2)
  ]
  (one,) = planned("local.sh", "--dry_run", SCRIPT)
  assert one[2:] == ["python", SCRIPT]


def test_gpu_uses_an_environment_of_its_own() -> None:
  lines = planned("gpu.sh", "--dry_run", SCRIPT, "--steps=3", JAXPIPE_VENV="/v")
  assert lines[1][:2] == ["/v/bin/python", "launch/pip_install.py"]
  assert lines[-1] == ["JAX_PLATFORMS=cuda", "/v/bin/python", SCRIPT, "--steps=3"]
  assert len(planned("gpu.sh", "--dry_run")) == 2  # installs only


def test_slurm_runs_one_step_over_all_nodes() -> None:
  install, run = planned("slurm.sbatch", "--dry_run", SCRIPT, "--steps=3")
  assert install == ["launch/gpu.sh"]
  assert run[0] == "srun" and run[-4:] == [
    "launch/gpu.sh",
    SCRIPT,
    "--distributed=auto",
    "--steps=3",
  ]
  options = re.findall(r"^#SBATCH (--[\w-]+)", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
  assert {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal"} <= set(options)


def test_a_tpu_pod_is_asked_for_and_every_worker_runs_the_script() -> None:
  where = ("--name=n", "--zone=z", "--type=v5litepod-16", "--dry_run")
  create, archive, copy, run, delete = planned("tpu_pod.sh", *where, SCRIPT, "--prompt=a b")
  assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
  assert {"--zone=z", "--accelerator-type=v5litepod-16", "--node-id=n"} <= set(create)
  assert archive[:2] == ["git", "archive"] and archive[-1] == "HEAD"
  assert copy[3:5] == ["tpu-vm", "scp"] and "--worker=all" in copy
  assert run[3:5] == ["tpu-vm", "ssh"] and "--worker=all" in run
  (remote,) = (word.removeprefix("--command=") for word in run if word.startswith("--command="))
  # What the machines' shell will make of it.
  assert shlex.split(remote)[-4:] == [
    ".venv/bin/python",
    SCRIPT,
    "--distributed=auto",
    "--prompt=a b",
  ]
  assert "delete" in delete


@pytest.mark.parametrize(
  ("name", "args", "names"),
  [
    ("gpu.sh", ["--dry-run", SCRIPT], "--dry-run"),
    ("gpu.sh", ["absent.py"], "absent.py"),
    ("slurm.sbatch", [], "no script"),
    ("slurm.sbatch", ["--nodes=3", SCRIPT], "no script"),
    ("tpu_pod.sh", ["--name=n", SCRIPT], "--zone"),
    ("tpu_pod.sh", ["--name=n", "--zone=z", "--type=t"], "no script"),
    ("tpu_pod.sh", ["--name=n", "--zone=z", "--type=t", "absent.py"], "absent.py"),
    ("tpu_pod.sh", ["--names=n"], "--names=n"),
  ],
)
def test_bad_arguments_get_one_line_and_exit_2(name: str, args: list[str], names: str) -> None:
  done = launch(name, *args)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.count("\n") == 1
  assert names in done.stderr


def test_the_jobset_is_one_slice_whose_machines_find_each_other() -> None:
  yaml: Any = pytest.importorskip("yaml")
  (job,) = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
  assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  # The headless service, under which names resolve before anyone is ready.
  assert job["spec"]["network"]["enableDNSHostnames"] is True
  assert job["spec"]["network"]["publishNotReadyAddresses"] is True
  (workers,) = job["spec"]["replicatedJobs"]
  spec = workers["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 4 and spec["backoffLimit"] == 0
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"][:3] == ["python", SCRIPT, "--distributed=auto"]
  chips = container["resources"]["limits"]["google.com/tpu"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  assert eval(topology.replace("x", "*")) == chips * spec["parallelism"]
  mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
  assert any(word.startswith("--run_dir=/runs/") for word in container["command"])
  assert mounts == {"/runs"} and pod["restartPolicy"] == "Never"


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launchers_are_short_and_name_no_address(path: pathlib.Path) -> None:
  text = path.read_text()
  assert len(text.splitlines()) <= 60
  addresses = set(re.findall(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", text))
  assert addresses <= {HERE}
  assert not re.search(r"https?://|index-url", text.replace("--no-emit-index-url", ""))
