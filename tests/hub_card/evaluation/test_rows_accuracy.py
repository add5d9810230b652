"""Rows of one's own: what is asked, what is fed instead of the latents, and runs that go on."""

import base64
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.evaluation.asking_rows import RowsAsker
from vreflection_hub_card.evaluation.harness.answers import AnswerLog
from vreflection_hub_card.evaluation.interventions import INTERVENTIONS, reflection_latents
from vreflection_hub_card.evaluation.matching import Match
from vreflection_hub_card.evaluation.own_rows import fingerprint, read_own_rows
from vreflection_hub_card.evaluation.rows_accuracy import ask_and_summarise, decoding_options, evaluate_rows
from vreflection_hub_card.folder_lock import locked_folder
from vreflection_hub_card.glyphsearch import draw_question
from vreflection_hub_card.inference.attention_maps import GREEDY
from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint
from vreflection_hub_card.inference.encoding import encode_prompts, user_turn
from vreflection_hub_card.rows import BadRow
from vreflection_training.cli import main
from vreflection_training.commands.evaluate_rows import MATCHES, REPLACEMENTS, read_rows


@pytest.fixture(scope="module")
def embedded():
    return load_checkpoint(EMBEDDED, "cpu")


@pytest.fixture(scope="module")
def chains():
    """Scenes, and questions whose answers need the latents."""
    return [draw_question("test", index, "chains") for index in range(6)]


@pytest.fixture(scope="module")
def rows(chains):
    return [{"question": one.text, "answer": one.answer, "image": scene.image} for scene, one in chains]


@pytest.fixture
def folder(tmp_path, chains):
    """A folder with pictures and questions; the working folder is another one."""
    lines = []
    for index, (scene, question) in enumerate(chains):
        scene.image.save(tmp_path / f"{index}.png")
        lines.append({"question": question.text, "answer": question.answer, "image": f"{index}.png"})
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_command_names_what_there_is():
    assert REPLACEMENTS == tuple(INTERVENTIONS)
    from vreflection_hub_card.evaluation.matching import RULES

    assert MATCHES == tuple(RULES)


def test_only_the_last_turn_is_asked(chains):
    scene, question = chains[0]
    box = {"type": "reflection", "box": [0, 0, 1, 1]}
    row = {
        "images": [scene.image],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "First?"},
            {"role": "assistant", "content": [box, {"type": "text", "text": "One"}]},
            {"role": "user", "content": question.text},
            {
                "role": "assistant",
                "content": [box, {"type": "text", "text": " two "}, {"type": "text", "text": "words "}],
            },
        ],
    }
    (found,) = read_own_rows([row], Match())
    assert (found.id, found.question, found.reference) == ("0", question.text, "two words")
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in found.messages[2]["content"]] == ["text"]
    assert found.images == [scene.image]


USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    "row, match, fragment",
    [
        ({"question": "x", "image": "a.png"}, "exact", "Sample 1: `answer` must be a text, got None"),
        ({"question": "x", "answer": ["y"]}, "exact", "`answer` must be a text"),
        ({"question": "x", "answer": "y", "image": "none.png"}, "exact", "Sample 1: none.png: no such file"),
        ({"question": "x", "answer": "y", "images": "a.png"}, "exact", "`images` must be a list"),
        ({"question": "x", "answer": " "}, "exact", "empty answer"),
        ({"question": "x", "answer": "y"}, "letter", "one letter A to E, got 'y'"),
        ({"question": "x", "answer": "y"}, "number", "one number in digits, got 'y'"),
        ({"messages": [USER, ANSWER, USER]}, "exact", "ends with a turn of role 'user'"),
        ({"messages": [ANSWER]}, "exact", "no question before"),
        ({"prompt": "x"}, "exact", "no `messages`, nor `question`"),
        ({"id": "0", "question": "x", "answer": "1"}, "number", "'0' first: give each row its own"),
    ],
)
def test_bad_rows_are_found_before_any_is_asked(row, match, fragment):
    with pytest.raises(BadRow, match=fragment.replace("(", r"\(")):
        read_own_rows([{"question": "q", "answer": "(A) 1" if match == "letter" else 1}, row], Match(match))


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved", "saved splits", "images"])
def test_every_form_gives_the_same_rows(form, folder, tmp_path_factory):
    lines = [json.loads(line) for line in (folder / "my.jsonl").read_text().splitlines()]
    expected = read_own_rows(read_rows(folder / "my.jsonl", None), Match())
    path, split = folder / f"other.{form}", None
    if form == "jsonl":
        messages = [
            {
                "images": [line["image"]],
                "messages": [USER | {"content": line["question"]}, ANSWER | {"content": line["answer"]}],
            }
            for line in lines
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in messages))
    elif form == "json":
        path.write_text(json.dumps(lines))
    elif form == "parquet":
        Dataset.from_list(lines).to_parquet(path)
    elif form == "images":
        path, split = folder, None
        (folder / "my.jsonl").rename(folder / "metadata.jsonl")
        named = [{"file_name": line.pop("image"), **line} for line in lines]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    else:
        dataset = Dataset.from_list([line | {"image": str(folder / line["image"])} for line in lines])
        if form == "saved splits":
            dataset, split = DatasetDict(test=dataset, train=dataset.select([0])), "test"
            dataset.save_to_disk(path)
            with pytest.raises(InputError, match="name one `split` of test, train"):
                read_rows(path, None)
        else:
            dataset.save_to_disk(path)
    found = read_own_rows(read_rows(path, split), Match())
    assert [(row.question, row.reference) for row in found] == [(row.question, row.reference) for row in expected]
    pictures = [[row.conversation()[0]["content"][0]["image"].tobytes() for row in of] for of in (found, expected)]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_answers_and_replaced_answers_are_those_of_generate(embedded, rows, chains):
    """By hand, one row at a time; shuffled: the row half the file further on."""
    model, processor = embedded
    evaluation = evaluate_rows(
        model,
        processor,
        rows[:4],
        replace=("zeroed", "shuffled", "other_picture"),
        batch_size=4,
        max_new_tokens=14,
    )

    def ask(index, picture=None, **options):
        scene, question = chains[index]
        inputs = encode_prompts(
            processor, user_turn([chains[index if picture is None else picture][0].image], question.text), "cpu"
        )
        output = model.generate(**inputs, **GREEDY, max_new_tokens=14, return_dict_in_generate=True, **options)
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        return processor.decode(tokens[0], skip_special_tokens=True).strip(), output.latents

    own = [ask(index) for index in range(4)]
    for index, sample in enumerate(evaluation.samples):
        text, latents = own[index]
        assert sample["text"] == text and sample["reflected"] and sample["tokens"] == 12
        partner = (index + 2) % 4
        fed = {
            "zeroed": torch.zeros_like(latents),
            "shuffled": own[partner][1],
            "other_picture": ask(index, partner, reflect=True)[1],
        }
        for name, replaced in fed.items():
            assert sample["replaced"][name]["text"] == ask(index, latents=replaced)[0], name
        assert [len(looks) for looks in sample["looks"]] == [8]
    assert evaluation.result["sentence"].startswith("The answers depend on the latents: −")
    assert evaluation.result["accuracy"]["successes"] == sum(
        text == one.answer for (text, _), (_, one) in zip(own, chains)
    )


def test_the_nth_reflection_is_fed_the_nth_and_none_its_own():
    from vreflection_hub_card.evaluation.interventions import replace_reflections

    own = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [5.0]])]
    other = [torch.tensor([[6.0], [7.0], [8.0]]), torch.tensor([[9.0]])]

    def fed(name, other=None):
        return replace_reflections(name, own, None, other, torch.Generator(), 9)[:, 0].tolist()

    assert fed("reversed") == [2, 1, 5, 4, 3, 5, 4, 3, 5]
    assert fed("first_look") == [1, 1, 3, 3, 3, 3, 3, 3, 3]
    assert fed("zeroed") == [0] * 9
    assert fed("shuffled", other) == [6, 7, 9, 9, 9, 9, 9, 9, 9]
    assert fed("shuffled", other[:1]) == [6, 7, 6, 7, 8, 6, 7, 8, 6]


def test_several_reflections_in_an_answer_are_told_apart(embedded):
    start, slot, end = embedded[0].config.latent_token_ids
    tokens = torch.tensor([[start, slot, slot, end, 5, start, slot, end, start, slot], [5] * 10])
    latents = torch.arange(4.0).view(1, 4, 1).expand(2, 4, 1)
    found = reflection_latents(latents, tokens, embedded[0].config)
    assert [[of[:, 0].tolist() for of in row] for row in found] == [[[0, 1], [2]], []]


class IdleLatents(VReflectionForConditionalGeneration):
    """Reads zeros from its slots, whatever is fed to them."""

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, reflection=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, reflection=reflection, **kwargs
        )
        if "latent_state" in inputs:
            inputs["latent_state"] = torch.zeros_like(inputs["latent_state"])
        return inputs


def test_a_model_with_idle_latents(rows):
    model, processor = (
        IdleLatents.from_pretrained(EMBEDDED, dtype=torch.float32).eval(),
        load_checkpoint(EMBEDDED, "cpu")[1],
    )
    options = {"batch_size": 6, "max_new_tokens": 14}
    said = evaluate_rows(model, processor, rows, **options).samples
    rows = [row | {"answer": sample["text"]} for row, sample in zip(rows, said)]
    result = evaluate_rows(model, processor, rows, replace=("zeroed", "shuffled"), **options).result
    assert result["sentence"].startswith("The answers do not depend on the latents: 0.0 points when zeroed")


def test_answers_without_reflections_are_counted_and_stay(embedded, rows):
    with pytest.raises(ValueError, match="no latents to replace"):
        evaluate_rows(*embedded, rows[:2], replace=["zeroed"], reflect=False)
    with pytest.raises(ValueError, match="'erased'; choose of zeroed"):
        evaluate_rows(*embedded, rows[:2], replace=["erased"])
    # DAC has nothing to look at in a row without a picture.
    mixed = [*rows[:2], {"question": "Which glyph is on the red circle?", "answer": "A"}]
    result = evaluate_rows(*embedded, mixed, replace=["zeroed", "shuffled"], batch_size=3, max_new_tokens=14).result
    assert (result["reflection_rate"]["successes"], result["reflection_rate"]["count"]) == (2, 3)
    assert {name: one["accuracy"]["count"] for name, one in result["replacements"].items()} == {
        "zeroed": 2,
        "shuffled": 2,
    }


@pytest.mark.parametrize("stop", [*(pytest.param(stop, marks=pytest.mark.slow) for stop in (2, 5)), 7])
def test_a_killed_run_goes_on_and_gives_the_same(stop, embedded, rows, tmp_path):
    model, processor = embedded
    names, asked = ("zeroed", "shuffled"), read_own_rows(rows[:3], Match())
    decoding = decoding_options(model, names, 14, None, None, None)
    given = []

    def run(folder, stop=None):
        log = AnswerLog(folder, {"rows": fingerprint(asked)}, 0)
        add = log.add

        def add_until_killed(answers):
            if stop is not None and len(given) >= stop:
                raise KeyboardInterrupt
            given.extend(answers)
            add(answers)

        log.add = add_until_killed
        return ask_and_summarise(RowsAsker(model, processor, asked, decoding, 2, log), Match(), names)

    whole = run(tmp_path / "whole")
    total, given[:] = len(given), []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop)
    path = tmp_path / "killed" / "answers.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # the last line is damaged, too: its row is asked again
    given.clear()
    again = run(tmp_path / "killed")
    assert again == whole
    assert len(given) == total - stop + 1
    given.clear()
    assert run(tmp_path / "killed") == whole and given == []


def test_two_runs_in_one_folder(tmp_path):
    program = f"from pathlib import Path\nfrom vreflection_hub_card.folder_lock import locked_folder\nwith locked_folder(Path({str(tmp_path)!r})): print('in')"
    with locked_folder(tmp_path):
        with pytest.raises(InputError, match="another process"):
            with locked_folder(tmp_path):
                pass
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
        assert "another process is writing there" in other.stderr
    with locked_folder(tmp_path):  # the folder is free again
        pass


def test_the_command(folder, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    arguments = [
        "evaluate",
        "--rows",
        str(folder / "my.jsonl"),
        "--limit",
        "4",
        "--batch-size",
        "4",
        "--max-new-tokens",
        "14",
    ]
    assert main([*arguments, "--replace", "zeroed"]) == 0
    out = capsys.readouterr().out
    assert "The answers depend on the latents: −" in out and "4 answers hold a reflection, 0 don't" in out
    report = json.loads(open("evaluation/results.json").read())
    assert list(report) == ["command", "date", "seconds", "model", "options", "limit", "versions", "machine", "tasks"]
    assert report["command"].startswith(
        "vreflection evaluate vreflection_tiny --rows my.jsonl --limit 4 --match exact --latent-steps 8"
    )
    assert report["command"].endswith("--batch-size 4 --replace zeroed") and str(folder) not in json.dumps(report)
    assert report["tasks"]["rows"]["accuracy"]["count"] == 4
    assert open("evaluation/replacements.png", "rb").read(4) == b"\x89PNG"
    samples = [json.loads(line) for line in open("evaluation/samples.jsonl")]
    assert [sample["id"] for sample in samples] == ["my-0", "my-1", "my-2", "my-3"]

    assert main([*arguments, "--latent-steps", "4"]) == 2
    assert "latent_steps = 8, not 4; choose another output folder" in capsys.readouterr().err
    assert main([*arguments[:4], "3", *arguments[5:]]) == 2
    assert "given with rows = " in capsys.readouterr().err
    assert main(["evaluate", "--compare", "evaluation", "evaluation"]) == 0
    assert "rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["--match", "exact", "--tolerance", "1"], "tolerance is for numbers"),
        (["--tasks", "glyphsearch"], "leave one of them out"),
        (["--latent-steps", "4", "8"], "one number of --latent-steps"),
        (["--latent-steps", "0", "--replace"], "no latents to replace"),
        (["--difficulty", "easy"], "no meaning for --rows"),
        (["--split", "test"], "has no splits"),
    ],
)
def test_mistakes(arguments, fragment, folder, capsys):
    assert main(["evaluate", "--rows", str(folder / "my.jsonl"), "--output", str(folder / "out"), *arguments]) == 2
    assert fragment in capsys.readouterr().err


def test_options_of_rows_need_rows(capsys, monkeypatch, tmp_path):
    assert main(["evaluate", "--replace"]) == 2
    assert "--replace is for --rows" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    assert main(["evaluate", "--rows", str(tmp_path / "empty.jsonl")]) == 2
    assert "the file is empty" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", "--rows", str(tmp_path / "empty.jsonl")]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_what_is_asked_is_known_by_pictures_of_every_kind(tmp_path):
    shown = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    hashes = []
    for picture in shown:
        file = io.BytesIO()
        picture.save(file, "png")
        kinds = (picture, np.asarray(picture), "data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
        for image in (*kinds, file.getvalue(), {"bytes": file.getvalue(), "path": None}):
            (row,) = read_own_rows([{"id": "a", "question": "What?", "answer": "A", "image": image}], Match())
            hashes.append(fingerprint([row]))
    assert not set(hashes[:5]) & set(hashes[5:])
