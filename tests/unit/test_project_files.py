"""The files around the package agree with each other and with it."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import xclip_lab
from tests.shared import ROOT
from xclip_lab.config import load_config, presets, to_dict
from xclip_lab.heads import HEADS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
METADATA = PROJECT["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEGABYTE = 1_000_000


def direct_requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for, extras included, without the package's own name."""
    lines = [*METADATA["dependencies"], *chain(*METADATA["optional-dependencies"].values())]
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.name != METADATA["name"]]


def pins() -> dict[str, Version]:
    """constraints.txt: canonical name to version; each line must be a plain pin."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, version = line.split("==")
        key = canonicalize_name(name, validate=True)
        assert key not in found, f"{name} is pinned twice"
        found[key] = Version(version)
    return found


@cache
def project_files() -> tuple[Path, ...]:
    """What git tracks or would track."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: what belongs to the project is not known")
    return tuple(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_a_direct_dependency_is_pinned_inside_its_range(requirement):
    found = pins()
    key = canonicalize_name(requirement.name)
    assert key in found, f"{requirement.name} has no line in constraints.txt"
    assert found[key] in requirement.specifier
    assert requirement.specifier, f"{requirement.name} has no lower bound"


def test_constraints_are_sorted_and_leave_cuda_to_torch():
    names = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert names == sorted(names, key=str.upper)
    of_a_platform = re.compile(r"nvidia-|cuda-|triton|pywin|appnope|colorama")
    assert not [name for name in pins() if of_a_platform.match(name)]
    assert canonicalize_name(METADATA["name"]) not in pins()


def test_conda_and_make_ask_for_the_python_of_the_package():
    conda = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
    specifiers = {re.split(r"[<>=]", line)[0]: re.sub(r"^[a-z]+", "", line) for line in conda}
    wanted = SpecifierSet(METADATA["requires-python"])
    assert SpecifierSet(specifiers["python"]) == wanted
    assert {"pip", "ffmpeg"} <= specifiers.keys()
    low, high = re.findall(r"\((\d+, \d+)\) <=? sys|< \((\d+, \d+)\)", MAKEFILE)
    assert SpecifierSet(f">={low[0]},<{high[1]}".replace(", ", ".")) == wanted
    classified = [line.rpartition(" ")[2] for line in METADATA["classifiers"] if ":: 3." in line]
    assert classified == [f"3.{minor}" for minor in range(30) if f"3.{minor}" in wanted]


def test_pip_lines_of_conda_stand_for_the_package_and_its_pins():
    (lines,) = (entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    assert "-c constraints.txt" in lines
    assert [line for line in lines if line.startswith("-e ")] == ["-e .[dev]"]
    for line in lines:
        if line.startswith("-c "):
            assert (ROOT / line.removeprefix("-c ")).is_file()
        elif line.startswith("-e "):
            path, _, extras = line.removeprefix("-e ").rstrip("]").partition("[")
            assert (ROOT / path / "pyproject.toml").is_file()
            assert set(filter(None, extras.split(","))) <= METADATA["optional-dependencies"].keys()
        else:
            requirement = Requirement(line)
            assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_conda_installs_nothing_that_make_does_not():
    assert '-c $(CONSTRAINTS) -e ".[dev]"' in MAKEFILE
    assert "CONSTRAINTS ?= constraints.txt" in MAKEFILE


def test_the_readme_names_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:^\s*(?:\$ )?|`)make ([a-z-]+)", readme, re.MULTILINE))
    assert {"quickstart", "test"} <= named
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert named <= targets
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == targets


def test_ci_runs_everything():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert script.read_text().rstrip().endswith("make test-all"), "pytest's closing line must be the last"


# Pieces, so that this file does not contain what it looks for.
HOSTS = [
    ".".join(parts)
    for parts in [
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("deb", "debian", "org"),
        ("anaconda", "org"),
        ("download", "pytorch", "org"),
    ]
]
OF_ONE_MACHINE = ["--index" + "-url", "--find" + "-links"]
OF_ONE_MACHINE += ["/" + folder for folder in ("work/", "tmp/venv", "root/", "home/", "Users/")]


def test_nothing_names_a_registry_host_or_a_place_on_one_machine():
    pattern = re.compile("|".join(rf"(?<![\w.~}}]){re.escape(text)}" for text in OF_ONE_MACHINE + HOSTS))
    assert pattern.search("pip install " + OF_ONE_MACHINE[0])
    assert pattern.search('"' + OF_ONE_MACHINE[2] + 'x"')
    found = []
    for path in project_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a binary file
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    assert not found


def test_no_large_file():
    assert not [str(path) for path in project_files() if path.stat().st_size > MEGABYTE]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stripped_and_has_plain_parameters(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    (parameters,) = (cell for cell in code if "parameters" in cell["metadata"].get("tags", []))
    assigned = {}
    for statement in ast.parse("".join(parameters["source"])).body:
        assert isinstance(statement, ast.Assign)
        (target,) = statement.targets
        assert isinstance(target, ast.Name)
        assigned[target.id] = ast.literal_eval(statement.value)
    assert assigned["smoke"] is False


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_defines_no_long_function(path):
    cells = json.loads(path.read_text())["cells"]
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # Lines of IPython's own begin with % or ! and are not Python.
    plain = "\n".join(
        line for line in "\n".join(source).splitlines() if not line.lstrip().startswith(("%", "!"))
    )
    functions = [node for node in ast.walk(ast.parse(plain)) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno > 5]


def test_one_version_and_one_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == METADATA["version"] == xclip_lab.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == METADATA["license"] == "Apache-2.0"
    assert METADATA["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert text.count("\n") > 200, "LICENSE is not the whole text"
    for name in ("README.md", "CONTRIBUTING.md"):
        mentions = re.findall(r"\b(MIT|BSD|GPL|Apache)[ -](?:[Ll]icen[cs]e|2\.0)", (ROOT / name).read_text())
        assert set(mentions) <= {"Apache"}, f"{name} mentions another licence"


def test_presets_belong_to_the_package():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["xclip_lab"]
    package = ROOT / "xclip_lab"
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    data = {path for path in project_files() if package in path.parents and path.suffix not in (".py", "")}
    assert data <= packaged
    assert "quickstart" in presets()


def ledger_rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "ledger.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def test_the_ledger_names_switches_that_exist():
    values = to_dict(load_config("quickstart"))
    known = {f"{section}.{key}" for section, of in values.items() if isinstance(of, dict) for key in of}
    known |= {f"head.{field.name}" for head in HEADS.names() for field in fields(HEADS[head].config_class)}
    rows = ledger_rows()
    assert {len(row) for row in rows} == {6}
    named = {name for row in rows for name in re.findall(r"`(\w+\.\w+)`", row[3])}
    assert len(named) >= 4
    assert named <= known


def test_the_ledger_names_tests_that_exist():
    named = re.findall(r"`(tests/\S+?\.py)::(\w+)`", (ROOT / "docs" / "ledger.md").read_text())
    assert len(named) >= 8
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in _read(ROOT / path)]
    assert not missing


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


@pytest.mark.slow
def test_a_wheel_carries_code_presets_and_licence(tmp_path):
    """What an installation that is not editable brings. Built from a copy: no build folder stays here."""
    source = tmp_path / "source"
    for path in project_files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    inside = {line.split()[0] for line in listing.splitlines()[1:]}
    package = ROOT / "xclip_lab"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in project_files()
        if package in path.parents and path.suffix in (".py", ".yaml")
    }
    assert wanted <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if name.startswith("tests/")]
