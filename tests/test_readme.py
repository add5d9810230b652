"""The README tells the truth: its layout, its Python, its recipes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vreflection_hub_card.glyphsearch import make_scene, scene_seed


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def test_the_layout_names_every_file_and_no_other():
    named, folders = set(), []
    for line in re.search(r"```\n(.*?)```", section("Layout"), re.DOTALL)[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [line.split()[0].rstrip("/")]
        named.add("/".join(folders))
    assert not [name for name in named if not (ROOT / name).exists()]
    packages = ("modeling_vreflection", "hub_card", "training")
    files = {path for package in packages for path in (ROOT / package).rglob("*.py")}
    files = {path.relative_to(ROOT) for path in files if path.name != "__init__.py"}
    assert {str(path) for path in files if "vreflection_tiny" not in path.parts} <= named


def test_the_loading_example_runs(tmp_path):
    (tmp_path / "hub_card").symlink_to(ROOT / "hub_card")
    make_scene(scene_seed("test", 0)).image.save(tmp_path / "scene.png")
    code = re.search(r"```python\n(.*?)```", section("Load"), re.DOTALL)[1]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert re.fullmatch(r"[A-Z]\n", ran.stdout), ran.stderr


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\w+/[\w/]+\.yaml", README))))
def test_the_recipes_exist(path):
    assert (ROOT / path).is_file()
