"""What the pages name exists: files, links, headings, commands, tests, Python names."""

import ast
import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
MAKE = DOCS / "make"
SCRIPTS = sorted(path.name for path in MAKE.glob("*.py"))
PAGES = [
  "README.md",
  "CONTRIBUTING.md",
  *(str(path.relative_to(ROOT)) for path in sorted(DOCS.rglob("*.md"))),
]
# A file or folder, from the root of the repository or from jaxpipe/ (`pipeline/table/lower.py`).
_TOP = r"(?:docs|jaxpipe|experiments|launch|tests)/[\w./-]*"
_BELOW = (
  r"(?:data|models|parallel|pipeline|schedules|stack|training)/[\w./-]+\.(?:py|md|sh|png|json)"
)
_PATH = re.compile(rf"(?<![\w/.:-])(?:\./)?({_TOP}|{_BELOW})")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"launch/test\.sh ([^\n`|#]*)")
_TEST = re.compile(r"\btest_\w+(?!\w*\.py)")
_NAME = re.compile(r"(?<![\w/.-])jaxpipe(?:\.\w+)+(?!\.?\w)")
_SECTION = re.compile(r"<!-- (docs/make/\w+\.py) -->(.*?)<!-- end of \1 -->", re.DOTALL)


def paths(text: str) -> list[str]:
  """The files and folders that a text names, but for `experiments/NAME`, which stands for any."""
  found = (path.rstrip(".") for path in _PATH.findall(text))  # the dot may end a sentence
  return [path for path in found if not path.endswith("/NAME")]


def exists(path: str) -> bool:
  return any((root / path).exists() for root in (ROOT, ROOT / "jaxpipe"))


def slug(heading: str) -> str:
  """The anchor that a heading has: as GitHub makes it."""
  text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
  return text.replace(" ", "-")


def anchors(text: str) -> set[str]:
  prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
  return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)}


def dead_links(page: str, text: str) -> list[str]:
  """The relative links of a page that lead to no file, or to no heading of one."""
  found = []
  for link in _LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
    if re.match(r"\w+:", link):
      continue
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
      found.append(link)
  return found


def docstrings(source: str) -> str:
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
  nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
  return "\n".join(ast.get_docstring(node) or "" for node in nodes)


def functions() -> dict[str, set[str]]:
  """File of tests -> the names of its functions."""
  return {
    str(path.relative_to(ROOT)): set(re.findall(r"^ *def (\w+)", path.read_text(), re.MULTILINE))
    for path in (ROOT / "tests").rglob("*.py")
  }


def resolves(name: str) -> bool:
  """Whether a dotted name is a module of ours, or what one has."""
  parts = name.split(".")
  for n in range(len(parts), 0, -1):
    try:
      found = importlib.import_module(".".join(parts[:n]))
    except ModuleNotFoundError:
      continue
    for part in parts[n:]:
      if not hasattr(found, part):
        return False
      found = getattr(found, part)
    return True
  return False


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_of_a_page_exist(page):
  text = (ROOT / page).read_text()
  assert [path for path in paths(text) if not exists(path)] == []
  assert dead_links(page, text) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_files_that_a_script_names_exist(script):
  named = paths(docstrings((MAKE / script).read_text()))
  assert [path for path in named if not exists(path)] == []


@pytest.mark.parametrize("page", PAGES)
def test_python_names_of_a_page_exist(page):
  names = set(_NAME.findall((ROOT / page).read_text()))
  assert sorted(name for name in names if not resolves(name)) == []


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_exist(page):
  text, known = (ROOT / page).read_text(), functions()
  assert set(_TEST.findall(text)) <= set().union(*known.values())
  for command in _COMMAND.findall(text):
    # Words with an underscore are part of a function's name; others may be of a case, as `gpipe`.
    for word in re.findall(r"-k (\w+_\w+)", command):
      files = [file for file in known if file.startswith(tuple(paths(command)))]
      assert any(word in name for file in files for name in known[file]), command


def test_sections_are_those_of_scripts():
  owners = set()
  for page in PAGES:
    text = (ROOT / page).read_text()
    sections = _SECTION.findall(text)
    assert text.count("<!-- ") == 2 * len(sections), page
    for script, _ in sections:
      source = (ROOT / script).read_text()
      assert f'write_section("{pathlib.Path(page).name}", "{pathlib.Path(script).name}"' in source
      owners.add(pathlib.Path(script).name)
  writing = {name for name in SCRIPTS if "write_section(" in (MAKE / name).read_text()}
  assert writing - {"section.py"} == owners


def test_the_page_of_schedules_says_what_the_registry_says():
  spec = importlib.util.spec_from_file_location("page_of_schedules", MAKE / "schedules.py")
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  page = (DOCS / "schedules.md").read_text()
  for name, family in script.FAMILIES.items():
    assert script.section(name, family) in page, "run .venv/bin/python docs/make/schedules.py"


def test_every_page_is_linked():
  linked = set()
  for page in PAGES:
    for link in _LINK.findall((ROOT / page).read_text()):
      linked.add(((ROOT / page).parent / link.partition("#")[0]).resolve())
  # GitHub shows these two by itself.
  pages = {ROOT / page for page in PAGES} - {ROOT / "README.md", ROOT / "CONTRIBUTING.md"}
  assert pages - linked == set()


def test_folders_have_no_circle_and_no_upward_arrow():
  script = str(MAKE / "architecture.py")
  run = subprocess.run([sys.executable, script, f"--root={ROOT}"], capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr


def test_the_table_of_folders_is_that_of_the_code(monkeypatch):
  monkeypatch.syspath_prepend(MAKE)
  architecture, imports, section = map(
    importlib.import_module, ("architecture", "imports", "section")
  )
  expected = architecture.table(imports.read_package(ROOT)).strip()
  written = section.read_section("architecture.md", "architecture.py")
  assert written == expected, "run .venv/bin/python docs/make/architecture.py"


@pytest.mark.parametrize(
  "text",
  [
    "see `jaxpipe/models/stack.py`",
    "`./launch/test.sh tests/nowhere -k some`",
    "`pipeline/lower.py` lowers",
    "by `.venv/bin/python docs/make/nothing.py`.",
  ],
)
def test_a_path_that_does_not_exist_is_found(text):
  assert [path for path in paths(text) if not exists(path)] != []


@pytest.mark.parametrize("link", ["docs/nothing.md", "docs/memory.md#no-such-heading", "#nowhere"])
def test_a_dead_link_is_found(link):
  assert dead_links("README.md", f"a [link]({link})") == [link]
  assert dead_links("README.md", "[one](docs/memory.md#what-zero-bubble-costs)") == []


def test_a_name_that_does_not_exist_is_found():
  assert not resolves("jaxpipe.pipeline.nothing") and not resolves("jaxpipe.make_nothing")
  assert resolves("jaxpipe.pipeline.timeline.measure")
