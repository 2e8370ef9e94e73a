"""The command line: its formats, its exit codes, and what it must not import."""

import json
import subprocess
import sys

import pytest

from jaxpipe.schedules import make_schedule, schedule_names, to_csv
from jaxpipe.schedules.command.cli import main

SIZES = ["--devices", "2", "--microbatches", "3"]


def test_starts_without_jax_or_matplotlib():
  program = (
    "import runpy, sys\n"
    "sys.argv = ['x', '1f1b', '--devices', '2', '--microbatches', '3', '--format', 'csv']\n"
    "try: runpy.run_module('jaxpipe.schedules', run_name='__main__')\n"
    "except SystemExit as end: assert end.code == 0, end.code\n"
    "heavy = {'jax', 'jaxlib', 'flax', 'matplotlib', 'numpy'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert (run.returncode, run.stderr) == (0, "")
  assert run.stdout == "0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n"


def test_unknown_flags_exit_2_in_one_line():
  command = [sys.executable, "-m", "jaxpipe.schedules", "1f1b", *SIZES, "--colour", "red"]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.returncode == 2 and run.stdout == ""
  assert run.stderr == "python -m jaxpipe.schedules: unrecognized arguments: --colour red\n"


def test_list(capsys):
  assert main(["--list"]) == 0
  assert capsys.readouterr().out.split() == list(schedule_names())


def test_json(capsys):
  assert main(["1f1b", *SIZES, "--costs", "2,3,1,1", "--format", "json"]) == 0
  assert json.loads(capsys.readouterr().out) == {
    "name": "1f1b",
    "devices": 2,
    "microbatches": 3,
    "chunks": 1,
    "order": [
      ["0F0", "0F1", "0B0", "0F2", "0B1", "0B2"],
      ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"],
    ],
    "ticks": [[0, 1, 3, 4, 5, 7], [1, 2, 3, 4, 5, 6]],
    "makespan": 28,
    "span": 28,
    "bubble": pytest.approx(10 / 28),
    "span_bubble": pytest.approx(10 / 28),
    "peak_activations": [2, 1],
    "peak_pending_weight_grads": [0, 0],
    "peak_memory": [2, 1],
  }


def test_costs_and_memory_by_stage(capsys):
  flags = ["--costs", "1:2,1,1.5:1,0", "--memory", "1:10,0,-1:-10", "--format", "json"]
  assert main(["gpipe", *SIZES, *flags]) == 0
  assert json.loads(capsys.readouterr().out)["peak_memory"] == [3, 30]


@pytest.mark.parametrize("form", ["text", "json", "csv", "perfetto"])
def test_out_writes_what_would_be_printed(form, tmp_path, capsys):
  path = tmp_path / "out"
  assert main(["gpipe", *SIZES, "--backward", "split", "--format", form]) == 0
  printed = capsys.readouterr().out
  assert main(["gpipe", *SIZES, "--backward", "split", "--format", form, "--out", str(path)]) == 0
  assert path.read_text() == printed != "" == capsys.readouterr().out


def test_png(tmp_path):
  path = tmp_path / "out.png"
  assert main(["1f1b", *SIZES, "--format", "png", "--out", str(path)]) == 0
  assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_order_reads_what_csv_wrote(tmp_path, capsys):
  schedule = make_schedule("1f1b", devices=2, microbatches=3)
  path = tmp_path / "mine.csv"
  # PyTorch leaves cells empty where a device idles.
  path.write_text(to_csv(schedule).replace("1F0", ",1F0") + "\n")
  assert main(["--order", str(path), "--format", "json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert (found["name"], found["order"]) == ("mine", schedule.tokens())


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "give either the NAME of a schedule or --order FILE; --list prints names"),
    (["1f1b"], "1f1b needs --devices"),
    (["1f1b", "--devices", "2"], "1f1b needs --microbatches"),
    (["2f2b", *SIZES], "unknown schedule '2f2b'; known: gpipe, 1f1b"),
    (["1f1b", "--devices", "0", "--microbatches", "3"], "devices=0; use devices=1 or more"),
    (["1f1b", *SIZES, "--chunks", "2"], "1f1b has 1 chunk(s) per device, not 2; use chunks=1"),
    (["1f1b", *SIZES, "--memory_limit", "1"], "above memory_limit=1; use memory_limit=2"),
    (["zb-h1", *SIZES, "--backward", "deferred"], "zb-h1 places weight gradients on its own"),
    (["1f1b", *SIZES, "--option", "waves=2"], "1f1b has no option 'waves'; it has none"),
    (["compare", *SIZES, "--backward", "split"], "compare takes every schedule in its own way"),
    (["compare", *SIZES, "--format", "csv"], "a comparison is a table, not a csv"),
    (["compare", "--devices", "2"], "compare needs --microbatches"),
    (
      ["compare", *SIZES, "--slack", "1"],
      "compare takes every schedule in its own way; drop --slack",
    ),
    (
      ["1f1b", *SIZES, "--option", "devices=2"],
      "devices is no option of a schedule; use --devices",
    ),
    (["hanayo", *SIZES, "--option", "waves=1", "--option", "waves=2"], "--option is given twice"),
    (["skippipe", *SIZES, "--format", "csv"], "which a CSV cannot hold; write JSON"),
    (
      ["1f1b", *SIZES, "--recompute", "--memory", "1,0,-1,1", "--memory_limit", "2"],
      "above memory_limit=2",
    ),
    (
      ["1f1b", *SIZES, "--execution", "coupled", "--slack", "1000000000"],
      "slack=1000000000 is longer than the schedule",
    ),
    (
      ["1f1b", *SIZES, "--costs", "1,1,1,1,hop_occupies_link=1", "--execution", "barrier"],
      "execution='barrier' has no links",
    ),
    (["1f1b", *SIZES, "--sends", "rendezvous"], "exchange both ways in one call"),
    (["1f1b", *SIZES, "--slack", "1"], "slack=1 needs 0 or more ticks, and execution='coupled'"),
    (["1f1b", *SIZES, "--fillers", "0"], "fillers"),
    (["1f1b", *SIZES, "--format", "png"], "give --out FILE.png"),
    (["1f1b", *SIZES, "--costs", "1:2:3,1,1,0"], "forward lists 3 stages, the schedule has 2"),
    (["1f1b", *SIZES, "--out", "/nowhere/at/all"], "No such file or directory"),
    (["--order", "/nowhere.csv"], "No such file or directory"),
  ],
)
def test_errors_are_one_line_and_exit_2(arguments, message, capsys):
  assert main(arguments) == 2
  out, err = capsys.readouterr()
  assert out == "" and message in err
  assert err.startswith("python -m jaxpipe.schedules: ") and err.count("\n") == 1


@pytest.mark.parametrize(
  "arguments",
  [
    ["1f1b", "--devices", "two"],
    ["1f1b", "--dev", "2"],
    ["1f1b", *SIZES, "--costs", "1,1,1"],
    ["1f1b", *SIZES, "--costs", "1,1,1,-1"],
    ["1f1b", *SIZES, "--memory", "1,x,1"],
    ["1f1b", *SIZES, "--format", "gif"],
    ["1f1b", "gpipe", *SIZES],
  ],
)
def test_flags_that_cannot_be_read_exit_2_in_one_line(arguments, capsys):
  with pytest.raises(SystemExit) as end:
    main(arguments)
  out, err = capsys.readouterr()
  assert end.value.code == 2 and out == "" and err.count("\n") == 1


@pytest.mark.parametrize(
  "text, flags, message",
  [
    ("0F0,0B0\n1B0,1F0\n", [], "1B0 on device 1 waits for 1F0, which stands later in the same"),
    ("0F0,0B0\n1F0,1SEND_F0\n", [], "device 1: '1SEND_F0' is not an action"),
    ("", [], "a schedule needs at least one action"),
    ("0F0,0B0\n1F0,1B0\n", ["--devices", "4"], "has devices=2, not 4; drop --devices"),
    ("0F0,0B0\n1F0,1B0\n", ["--memory_limit", "0.5"], "above memory_limit=0.5"),
    ("0F0,0B0\n1F0,1B0\n", ["1f1b"], "give either the NAME of a schedule or --order"),
  ],
)
def test_orders_that_are_refused(text, flags, message, tmp_path, capsys):
  path = tmp_path / "theirs.csv"
  path.write_text(text)
  assert main(["--order", str(path), *flags]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--memory_limit", "nan"], ["--costs", "inf,1,1,0"]])
def test_numbers_that_are_none_exit_2(capsys, flags):
  """A NaN limit would be no limit, since nothing compares above it."""
  with pytest.raises(SystemExit) as end:
    main(["1f1b", *SIZES, *flags])
  assert end.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_file_that_is_no_csv_is_one_line(capsys, tmp_path):
  file = tmp_path / "order.csv"
  file.write_text("0" * 200_000 + "F0")
  assert main(["--order", str(file)]) == 2
  assert capsys.readouterr().err.count("\n") == 1


def test_compare_prints_a_table_best_first(capsys):
  assert main(["compare", *SIZES]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("schedule") and any(line.startswith("1f1b ") for line in lines)
  assert main(["compare", *SIZES, "--format", "json"]) == 0
  rows = json.loads(capsys.readouterr().out)
  ran = [row["makespan"] for row in rows if "makespan" in row and "skip" not in row["label"]]
  assert ran == sorted(ran) and all("reason" in row for row in rows if "makespan" not in row)


def test_flags_add_what_stands_beside_the_passes(capsys):
  flags = ["--recompute", "--vocabulary", "1", "--post_validation", "--fillers", "1"]
  assert main(["1f1b", *SIZES, *flags, "--format", "json"]) == 0
  fields = json.loads(capsys.readouterr().out)
  kinds = {token.strip("0123456789") for row in fields["order"] for token in row}
  assert kinds == {"F", "R", "B", "S", "T", "U", "Y"}
  assert fields["vocabulary"] == 1


def test_costs_by_name_and_execution(capsys):
  arguments = ["gpipe", "--devices", "2", "--microbatches", "1", "--format", "json"]
  assert main([*arguments, "--costs", "1,1,1,0,head=10"]) == 0
  assert json.loads(capsys.readouterr().out)["makespan"] == 1 + 11 + 22 + 2
  assert main([*arguments, "--costs", "1,2,2,3", "--execution", "barrier"]) == 0
  assert json.loads(capsys.readouterr().out)["makespan"] == 1 + 3 + 1 + 3 + 4 + 3 + 4


def test_order_reads_json_with_paths(tmp_path, capsys):
  path = tmp_path / "skip.json"
  assert main(["skippipe", *SIZES, "--format", "json", "--out", str(path)]) == 0
  assert main(["--order", str(path), "--format", "json"]) == 0
  assert json.loads(capsys.readouterr().out) == json.loads(path.read_text())


@pytest.mark.parametrize(
  "text, message",
  [
    ('{"order":5}', "is not a list of lists of tokens"),
    ('{"order":[["0F0",1]]}', "is not a list of lists of tokens"),
    ('{"order":[["0F0","0B0"]],"paths":7}', "is not a list of lists of stages"),
    ('{"order":[["0F0","0B0"]],"name":"\\ud800"}', "is not a text"),
    ('{"order":[["0F0","0B0"]],"vocabulary":9}', "is not 0, 1 or 2"),
    ("[" * 100_000, "not JSON"),
  ],
)
def test_malformed_json_is_one_line(text, message, tmp_path, capsys):
  path = tmp_path / "x.json"
  path.write_text(text)
  assert main(["--order", str(path)]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_order_reads_a_byte_order_mark_and_two_barriers(tmp_path, capsys):
  path = tmp_path / "x.csv"
  flags = ["--vocabulary", "2", "--format", "csv", "--out", str(path)]
  assert main(["1f1b", *SIZES, *flags]) == 0
  path.write_text("\ufeff" + path.read_text())
  assert main(["--order", str(path), "--vocabulary", "2", "--format", "json"]) == 0
  assert json.loads(capsys.readouterr().out)["vocabulary"] == 2
