"""The documentation builds without a warning, its notebook runs, and its examples work."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vreflection_hub_card.glyphsearch import draw_question
from vreflection_hub_card.inference.clip_frames import MAX_FRAMES
from vreflection_training.cli import main


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.slow
def test_the_docs_build_and_the_notebook_runs(tmp_path):
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", DOCS, tmp_path / "html"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    notebook = (tmp_path / "html" / "ask_and_train.html").read_text()
    assert "8 steps" in notebook and notebook.count("<img") >= 2
    api = (tmp_path / "html" / "api.html").read_text()
    assert 'id="vreflection_training.losses.bcm_alignment_loss"' in api
    # What is left of a docstring's Markdown.
    assert not re.findall(r"\[<code|```|\[!NOTE\]", api)


def test_the_notebook_holds_no_outputs():
    cells = json.loads((DOCS / "ask_and_train.ipynb").read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_the_tutorials_row_and_recipe_pass_the_check(tmp_path, monkeypatch, capsys):
    tutorial = (DOCS / "tutorial.md").read_text()
    (tmp_path / "rows.json").write_text(re.search(r"```json\n(.*?)```", tutorial, re.DOTALL)[1])
    (tmp_path / "kitchen.yaml").write_text(re.search(r"```yaml\n(.*?)```", tutorial, re.DOTALL)[1])
    Image.new("RGB", (224, 168), "white").save(tmp_path / "kitchen.jpg")
    monkeypatch.chdir(tmp_path)
    assert main(["check", "kitchen.yaml"]) == 0
    assert re.search(r"^rows +1$", capsys.readouterr().out, re.MULTILINE)


def test_the_rows_of_frames_pass_the_check(tmp_path, monkeypatch, capsys):
    page = (DOCS / "moving_pictures.md").read_text()
    (tmp_path / "rows.json").write_text(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    (tmp_path / "clip").mkdir()
    for number in range(2):
        Image.new("RGB", (224, 168), "white").save(tmp_path / "clip" / f"{number}.jpg")
    recipe = "model_name_or_path: vreflection_tiny\ndataset_name: rows.json\noutput_dir: out\nmax_steps: 1\n"
    (tmp_path / "clip.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    assert main(["check", "clip.yaml"]) == 0
    assert re.search(r"^rows +2$", capsys.readouterr().out, re.MULTILINE)
    assert f"At most {MAX_FRAMES} frames" in page


def test_the_paths_that_pages_and_scripts_name_exist():
    folders = "tests|experiments|docs|hub_card|modeling_vreflection|training"
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(path for path in ROOT.glob(".ci/*") if path.is_file())]
    pages.remove(DOCS / "results.md")  # its commands are those of the day of each measurement
    named = {path for page in pages for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*\w", page.read_text())}
    assert len(named) > 20
    assert {path for path in named if not (ROOT / path).exists()} <= {"docs/_build"}  # built by the command beside it


def test_what_a_backbone_takes_exists():
    text = (DOCS / "adding_a_backbone.md").read_text()
    code = "".join(path.read_text() for path in ROOT.glob("modeling_vreflection/*.py"))
    files = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text)) - {"modeling_NAME_vreflection.py"}
    assert len(files) > 5
    assert not [
        file for file in files if not any((ROOT / folder / file).is_file() for folder in (".", "modeling_vreflection"))
    ]
    table = re.search(r"\| the mixins use.*?\n\n", text, re.DOTALL)[0]
    names = set(re.findall(r"`([a-z_]{5,})[`(]", table))
    assert len(names) > 12 and not [name for name in names if name not in code]
    assert set(re.findall(r"`(Reflection\w+Mixin)`", text)) == set(re.findall(r"class (Reflection\w+Mixin)\b", code))
    assert {"BACKBONES", "CLASSES", "MODEL_CLASSES"} <= set(re.findall(r"`([A-Z_]+)`", text))


@pytest.mark.slow
def test_the_ten_lines_run_on_twenty_rows(tmp_path):
    page = (DOCS / "ten_lines.md").read_text()
    commands = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1]
    assert commands.count("\n") == 10
    row = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    for name in ("train", "test"):
        lines = []
        for number in range(20):
            scene, question = draw_question(name, number, "default")
            scene.image.save(tmp_path / f"{name}{number}.png")
            row["images"] = [f"{name}{number}.png"]
            row["messages"][0]["content"][1]["text"] = question.text
            look, answer = row["messages"][1]["content"]
            look["boxes"], answer["text"] = [item.box for item in question.path], question.answer
            lines.append(json.dumps(row))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    ran = subprocess.run(
        ["bash", "-ec", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "The answers depend on the latents" in ran.stdout and "nothing was uploaded" in ran.stdout
    assert len((tmp_path / "measured" / "samples.jsonl").read_text().splitlines()) == 20


def test_the_version_heads_the_changelog():
    from modeling_vreflection import __version__

    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__


def test_the_citation_names_the_papers_authors_as_the_readme_does():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    bibtex = (ROOT / "README.md").read_text()
    assert paper["title"] in bibtex
    assert " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]) in bibtex


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_commands_and_recipes_of_the_docs_exist(page):
    text = page.read_text()
    recipes = set(
        re.findall(r"`vreflection (?:train|check) (\w+)|^vreflection (?:train|check) (\w+)", text, re.MULTILINE)
    )
    recipes = {one or other for one, other in recipes} - {"RECIPE", "kitchen", "looks"}
    assert not [name for name in recipes if not (ROOT / "training" / "recipes" / f"{name}.yaml").is_file()]
