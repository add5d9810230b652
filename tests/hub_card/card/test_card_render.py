"""The card says what the checkpoint, its training and its result files say, and what it tells people to run runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.card import TRAINING_FACTS, check_card, read_training_facts, write_card, write_training_facts
from vreflection_hub_card.card.checkpoint import read_checkpoint
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.evaluation.report import glyphsearch_table
from vreflection_hub_card.glyphsearch import draw_chain
from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_training.cli import build_parser, main


def blocks(card: ModelCard, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", card.text, re.DOTALL | re.MULTILINE)


def section(card: ModelCard, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card.text, re.DOTALL | re.MULTILINE)[1]


def load(path: Path) -> ModelCard:
    return ModelCard(path.read_text())


@pytest.mark.slow
def test_the_snippets_run(folder, results, tmp_path, monkeypatch, capsys):
    card = load(write_card(folder, "someone/tiny", results))
    scene, asked = draw_chain("test", 3)
    scene.image.save(tmp_path / "scene.png")
    code = "\n".join(blocks(card, "python"))
    assert code.count('"someone/tiny"') == 3
    code = code.replace("someone/tiny", str(folder))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    answer, piped, with_latents, without = ran.stdout.strip().splitlines()
    assert answer == piped == asked.answer
    assert with_latents == "{} 1 of 1" and re.fullmatch(r"\{'latent_steps': 0\} [01] of 1", without)

    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks(card, "bash") for line in block.splitlines()]
    asking = [shlex.split(line.replace("someone/tiny", str(folder)))[1:] for line in commands if " ask " in line]
    for arguments in asking:
        assert main(arguments) == 0
        assert capsys.readouterr().out.splitlines()[0] == asked.answer
    assert asking and (tmp_path / "heatmap.png").is_file()
    evaluating = [line for line in commands if " evaluate " in line]
    assert len(evaluating) == 2 and len(evaluating) + len(asking) == len(commands)
    for line in evaluating:  # they parse; what they do is tested with the harness
        build_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("shards", ["10GB", "500KB"])
def test_parameters_are_counted_without_loading(tiny_folder, tmp_path, shards):
    model = VReflectionForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "500KB")
    weights = read_checkpoint(tmp_path).weights
    numbers = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in (("total", model), ("bcm", model.model.bcm), ("dac", model.model.dac))
    }
    assert weights == {**numbers, "dtypes": ["bfloat16"]}
    both = numbers["bcm"] + numbers["dac"]
    card = load(write_card(tmp_path, license="mit", datasets=["someone/rows"]))
    line = next(line for line in card.text.splitlines() if "BCM and DAC together" in line)
    expected = (
        f"{both:,} parameters, {100 * both / numbers['total']:.1f} % of all, {2 * both / 1e6:.1f} MB in bfloat16"
    )
    assert expected in line


def test_the_overhead_is_that_of_the_paper(tiny_folder):
    """The modules' sizes follow from D and S; at the 7B's they are Tab. 3(e)'s."""

    def sizes(width, steps):
        attention = 4 * (width * width + width)
        return steps * width + attention + 2 * width, attention + 2 * width

    checkpoint = read_checkpoint(tiny_folder)
    config, weights = checkpoint.config, checkpoint.weights
    assert (weights["bcm"], weights["dac"]) == sizes(config.get_text_config().hidden_size, config.num_latent_tokens)
    assert round(sum(sizes(3584, 8)) / 1e6, 2) == 102.83


def test_results_are_quoted_and_without_a_file_there_is_no_number(folder, results):
    bare = load(write_card(folder))
    assert bare.data.eval_results is None
    assert "No score" in section(bare, "Results") and not re.search(r"\d", section(bare, "Results"))
    card = load(write_card(folder, results=results))
    reports = [json.loads(path.read_text()) for path in results]
    for report in reports:
        assert glyphsearch_table(report) in section(card, "Results")
    values = {(r.dataset_config, r.metric_name): r.metric_value for r in card.data.eval_results}
    for report in reports:
        task = report["tasks"]["glyphsearch"]
        difficulty = task["data"]["difficulty"]
        assert values[difficulty, "accuracy, 8 latent steps"] == task["accuracy"]["overall"]["share"]
        assert (
            values[difficulty, "accuracy with another sample's latents"]
            == task["interventions"]["shuffled"]["accuracy"]["overall"]["share"]
        )
    assert len(values) == sum(2 + len(report["tasks"]["glyphsearch"]["interventions"]) for report in reports) == 27


def test_a_study_is_quoted_as_what_it_is(folder, tmp_path):
    tables = tmp_path / "tables.md"
    tables.write_text("| arm | accuracy |\n|---|---|\n| sft | 12.3 % |\n")
    told = section(load(write_card(folder, study=tables)), "Results")
    assert "Not measured on these weights" in told and "| sft | 12.3 % |" in told
    assert "miniature" not in load(write_card(folder)).text
    for text, fragment in (("words", "no tables"), (None, "can't be read")):
        tables.unlink() if text is None else tables.write_text(text)
        with pytest.raises(InputError, match=fragment):
            write_card(folder, study=tables)


def test_the_training_is_told(folder, facts):
    write_training_facts(folder, facts)
    card = load(write_card(folder, "someone/model"))
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["someone/rows"]
    told = section(card, "Training")
    for expected in (
        "stage 1, BCM",
        "`someone/rows`",
        "`weight=3`",
        "`viscot_363k.json`",
        "CE + 0.25 L_BCM",
        "2,500 of 32 packs of at most 4 samples, on 4 processes; 1,234,567 tokens",
        "| learning_rate | `1e-05` |",
        "some GPU",
        "trl 1.16.0",
    ):
        assert expected in told
    assert "GlyphSearch" not in card.text.partition("## Do the latents")[0]
    assert "fine-tuned without reflections" not in card.text
    facts["runs"][0]["stage"] = "sft"
    write_training_facts(folder, facts)
    assert "fine-tuned without reflections" in load(write_card(folder)).text


def test_local_data_are_named_as_such_and_need_no_id(folder, facts):
    (source,) = [source for source in facts["runs"][0]["data"] if "local" in source]
    assert "/" not in source["local"]
    facts["runs"][0]["data"] = [source]
    write_training_facts(folder, facts)
    write_card(folder)
    card = check_card(folder)  # without `datasets`
    assert card.data.datasets is None and f"`{source['local']}` (local, not on the Hub" in section(card, "Training")
    facts["runs"][0]["data"] = []
    write_training_facts(folder, facts)
    with pytest.raises(InputError, match="datasets"):  # nobody knows what it was trained on
        check_card(folder)


def test_two_runs_are_two_columns_and_an_option_of_one_is_empty_in_the_other(folder, facts):
    facts["runs"].append(
        facts["runs"][0] | {"stage": "2", "title": "stage 2, DAC", "options": {"latent_inputs": "dac"}}
    )
    write_training_facts(folder, facts)
    told = section(load(write_card(folder)), "Training")
    assert "|  | stage 1, BCM | stage 2, DAC |" in told
    assert "| latent_inputs | `bcm` | `dac` |" in told and "| latent_loss | `l1` |  |" in told


def test_a_stage_without_a_title_has_its_own_name_and_a_title_breaks_no_table(folder, facts):
    facts["runs"].append(facts["runs"][0] | {"title": "two | parts\n# heading"})
    del facts["runs"][0]["title"]  # as files of older versions have none
    write_training_facts(folder, facts)
    assert "|  | stage 1 | two \\| parts # heading |" in section(load(write_card(folder)), "Training")


def test_a_table_has_no_gap_and_as_many_cells_in_each_row(folder, results, facts):
    for given in (None, facts):
        if given is not None:
            write_training_facts(folder, given)
        text = load(write_card(folder, results=results)).text
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            rows = table.splitlines()
            assert len(rows) > 2 and re.fullmatch(r"[|\- ]+", rows[1]), table
            assert len({row.replace("\\|", "").count("|") for row in rows}) == 1, table
        prose = re.sub("^```.*?^```", "code", text, flags=re.DOTALL | re.MULTILINE)
        assert "\n\n\n" not in prose and text.endswith("\n}\n```\n")


def test_a_checkpoint_without_modules(no_dac_folder, tmp_path):
    folder = shutil.copytree(no_dac_folder, tmp_path / "no_dac")
    card = load(write_card(folder, license="mit", datasets=["a/b"]))
    assert "| DAC, the student in training | none |" in card.text and "0 parameters, 0.0 %" in card.text
    assert '"dac"' not in card.text and "DAC's" not in card.text


def test_a_license_is_named_where_it_is_given(folder):
    (folder / TRAINING_FACTS).unlink()
    base = "Qwen/Qwen2.5-VL-7B-Instruct"
    card = load(write_card(folder, base_model=base))
    assert card.data.license is None and "These weights" not in card.text
    assert "- These weights: mit." in load(write_card(folder, base_model=base, license="mit")).text
    link = "https://example.org/license"
    card = load(write_card(folder, base_model=base, license="other", license_name="own", license_link=link))
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "own", link)
    assert f"- These weights: [own]({link})." in card.text
    for wrong in ({"license": "other"}, {"license": "mit", "license_name": "own", "license_link": link}):
        with pytest.raises(InputError, match="needs a name and a link"):
            write_card(folder, base_model=base, **wrong)


def test_a_model_from_nothing_has_no_base_and_is_apaches(folder):
    card = load(write_card(folder))
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert "none, trained from nothing" in card.text
    with pytest.raises(InputError, match="can't be someone/else: the checkpoint began as nothing"):
        write_card(folder, base_model="someone/else")


def test_facts_and_a_given_base_may_not_differ(folder, facts):
    write_training_facts(folder, facts)
    with pytest.raises(InputError, match="can't be someone/else: the checkpoint began as Qwen/Qwen2.5-VL-7B-Instruct"):
        write_card(folder, base_model="someone/else")
    write_training_facts(folder, facts | {"base_model": None})
    assert load(write_card(folder, base_model="a/b", license="mit")).data.base_model == "a/b"


@pytest.mark.parametrize("name", ["repo_id", "base_model"])
def test_what_is_no_id_is_refused(folder, name):
    (folder / TRAINING_FACTS).unlink()
    with pytest.raises(InputError, match="'/home/me/model' is no id on the Hub"):
        write_card(folder, license="mit", **{name: "/home/me/model"})


def test_what_is_no_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        write_card(tmp_path)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="damaged"):
        write_card(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        write_card(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda facts: facts.pop("from_scratch"), "`from_scratch` is missing"),
        (lambda facts: facts.update(from_scratch=True), "`from_scratch` is true, and yet"),
        (lambda facts: facts["runs"][0].pop("steps"), "run 0: `steps` is missing"),
        (lambda facts: facts["runs"][0].update(title=3), "run 0: `title` is missing or of the wrong type"),
    ],
)
def test_damaged_facts_are_refused(folder, facts, change, message):
    change(facts)
    write_training_facts(folder, facts)
    with pytest.raises(InputError, match=message):
        read_training_facts(folder)


def test_the_card_of_an_adapter_tells_to_merge_it(folder, facts):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    write_training_facts(folder, facts)
    card = load(write_card(folder, "someone/adapter"))
    assert card.data.base_model_relation == "adapter" and card.data.library_name == "peft"
    assert blocks(card, "bash")[0] == "vreflection merge someone/adapter merged\n"
    assert 'from_pretrained("merged"' in blocks(card, "python")[0]
    assert "all parameters" not in card.text
    check_card(folder)


EMBEDDED_CARD = EMBEDDED / "README.md"


def test_the_embedded_checkpoints_card_is_up_to_date(folder, results):
    study = EMBEDDED.parents[1] / "experiments" / "study" / "results" / "quick" / "tables.md"
    expected = write_card(folder.rename(folder.with_name(EMBEDDED.name)), results=results, study=study)
    assert EMBEDDED_CARD.read_text() == expected.read_text()
    check_card(EMBEDDED)


@pytest.mark.parametrize(
    "feedback, expected",
    [
        (
            "dac",
            "BCM doesn't run when the model answers; DAC runs at each latent step. A reflection costs 8 more steps",
        ),
        ("hidden", "With hidden feedback neither module runs when the model answers. A reflection costs 8 more steps"),
    ],
)
def test_which_module_runs_when_the_model_answers(folder, feedback, expected):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_feedback": feedback}))
    assert expected in load(write_card(folder)).text
