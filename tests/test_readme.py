"""The README holds what it says: its Python runs, its figures are those of the result file, its files and names exist."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vreflection_hub_card.evaluation.report import glyphsearch_table
from vreflection_hub_card.glyphsearch import make_scene, scene_seed


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def python_of(title: str) -> str:
    return re.search(r"```python\n(.*?)```", section(title), re.DOTALL)[1]


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs code in a folder that holds `hub_card`, as the repository does, and a picture for each name in the README."""
    (folder / "hub_card").symlink_to(ROOT / "hub_card")
    picture = make_scene(scene_seed("test", 0)).image
    for name in ("scene.png", "kitchen.jpg"):
        picture.save(folder / name)
    environment = {**os.environ, "HF_HOME": str(folder / "hf")}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_it_fits_on_two_screens():
    assert len(README.splitlines()) <= 170


def test_the_loading_example_runs(tmp_path):
    ran = run_python(python_of("Load"), tmp_path)
    assert re.fullmatch(r"[A-Z]\n", ran.stdout), ran.stderr


@pytest.mark.slow
def test_the_decoding_pages_examples_run(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs/decoding.md").read_text(), re.DOTALL)
    checks = "assert logits.shape[:2] == result.sequences.shape\nprint(result.latent_counts.tolist())\n"
    code = python_of("Load") + "import torch\n" + "".join(examples) + checks
    ran = run_python(code, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[8]"


@pytest.mark.slow
def test_own_data_trains(tmp_path):
    ran = run_python(python_of("Your own data") + python_of("Train"), tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "outputs" / "kitchen" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\w+/[\w/]+\.yaml", README))))
def test_the_recipes_exist(path):
    assert (ROOT / path).is_file()


def test_the_recipes_that_are_trained_by_name_exist():
    names = re.findall(r"vreflection train (\w+)", README)
    assert names and all((ROOT / "training" / "recipes" / f"{name}.yaml").is_file() for name in names)


def test_the_results_are_those_of_the_result_file():
    rendered = glyphsearch_table(
        json.loads((ROOT / "hub_card" / "results" / "vreflection_tiny_chains.json").read_text())
    )
    rows = [line for line in section("Results").splitlines() if line.startswith("|")]
    assert len(rows) > 2 and set(rows) <= set(rendered.splitlines())


def names_of(path: Path) -> set[str]:
    """The classes, functions and methods that a Python file defines; of a YAML file, its keys two levels down."""
    if path.suffix == ".yaml":
        return {name for value in yaml.safe_load(path.read_text()).values() for name in value}
    definitions = ast.FunctionDef, ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, definitions)}


TABLE = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[[^]]+\]\(([^)]+)\) \| ([^|]+) \|$", README, re.MULTILINE)


def test_the_table_has_every_equation():
    asked = {f"Eq. {number}" for number in range(1, 6)} | {"Alg. 1", "Sec. 3.4", "App. A", "Tab. 3", "Tab. 4"}
    assert asked <= {part for part, _, _ in TABLE}


@pytest.mark.parametrize("part, path, names", TABLE)
def test_the_table_leads_to_the_code(part, path, names):
    assert set(re.findall(r"`(\w+)`", names)) <= names_of(ROOT / path)


def test_links_lead_to_files():
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_layout_names_folders_that_exist():
    folders = []
    for line in re.search(r"```\n(.*?)```", section("Layout"), re.DOTALL)[1].splitlines():
        names = re.match(r" *((?:\w+/ ?)+)", line)[1].split()
        parent = folders[-1] if line.startswith(" ") else ROOT
        if not line.startswith(" "):
            folders.append(ROOT / names[0])
        assert all((parent / name).is_dir() for name in names), line
