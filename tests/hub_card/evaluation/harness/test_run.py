"""The paper's benchmarks from files to scores, kills included."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_files import ROWS, write_files

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.evaluation.benchmarks import SHORT_ANSWER
from vreflection_hub_card.evaluation.harness.run import evaluate
from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint


def counts(proportion):
    return proportion["successes"], proportion["count"]


def say(prompt):
    """Known answers, right and wrong."""
    if "door" in prompt:  # MMVP: three of four right, one pair of two
        return "(B)" if "door 2" in prompt and say.doors.pop(0) else "A"
    if "dog" in prompt:
        return "A"
    if "dots" in prompt:
        return "The answer is B"  # the authors' scorer reads an E
    if "car 0" in prompt:
        return next(letter for letter in "ABCD" if f"{letter}. red" in prompt)
    if "sign is number 3" in prompt:
        return "no idea"  # the authors' scorer reads a D, which is right
    if "thing" in prompt:  # GQA: case, punctuation and tags don't count, other words do
        said = ("<answer>T-Shirt.</answer>", "Yes", "dog")
        return next(answer for index, answer in enumerate(said) if f"thing {index}" in prompt)
    return "A"


EXPECTED = {
    ("mmvp", "strict", "accuracy"): (3, 4),
    ("mmvp", "strict", "pair"): (1, 2),
    ("vstar", "strict", "accuracy"): (2, 3),
    ("vstar", "strict", "category", "direct_attributes"): (1, 2),
    ("vstar", "strict", "category", "relative_position"): (1, 1),
    ("blink", "strict", "accuracy"): (10, 10),
    ("blink", "strict", "subset", "Jigsaw"): (2, 2),
    ("blink", "authors", "accuracy"): (0, 10),
    ("mmerealworld_lite", "strict", "accuracy"): (1, 4),
    ("mmerealworld_lite", "strict", "category", "Perception"): (1, 2),
    ("mmerealworld_lite", "strict", "category", "Reasoning"): (0, 2),
    ("mmerealworld_lite", "authors", "category", "Reasoning"): (1, 2),
    ("gqa", "exact_match", "accuracy"): (2, 3),
}
for size in ("hrbench4k", "hrbench8k"):
    EXPECTED |= {
        (size, "strict", "accuracy"): (5, 8),
        (size, "strict", "category", "FSP"): (4, 4),
        (size, "strict", "category", "FCP"): (1, 4),
        (size, "strict", "cycle"): (1, 2),
    }


def test_every_task_from_its_files_to_its_scores(data, scripted, tmp_path):
    say.doors = [False, True]
    asked = scripted(say)
    report = evaluate("vreflection_tiny", list(ROWS), tmp_path, data, batch_size=3)
    assert report == json.loads((tmp_path / "results.json").read_text())
    assert len(asked) == 4 + 3 + 10 + 8 + 8 + 4 + 3
    found = {}
    for path in EXPECTED:
        value = report["tasks"]
        for key in path:
            value = value[key]
        found[path] = counts(value)
    assert found == EXPECTED
    scorers = {name: "exact_match" if name == "gqa" else "strict" for name in ROWS}
    unparsed = {name: report["tasks"][name][scorer]["unparsed"] for name, scorer in scorers.items()}
    assert unparsed == dict.fromkeys(ROWS, 0) | {"mmerealworld_lite": 1}
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == len(asked)
    for sample in samples:
        prompt = f"{sample['question']}<|im_end|>\n<|im_start|>assistant\n"
        assert any(text.endswith(prompt) for text in asked)


def test_another_benchmark_does_not_replace_the_results_of_one(data, scripted, tmp_path):
    scripted(lambda prompt: "A")
    evaluate("vreflection_tiny", ["mmvp"], tmp_path, data, batch_size=4)
    with pytest.raises(InputError, match="holds results of mmvp, which would be lost"):
        evaluate("vreflection_tiny", ["vstar"], tmp_path, data, batch_size=4)
    both = evaluate("vreflection_tiny", ["mmvp", "vstar"], tmp_path, data, batch_size=4)
    assert list(both["tasks"]) == ["mmvp", "vstar"]


def test_pictures_reach_the_model(data, scripted, tmp_path):
    asked = scripted(lambda prompt: "A")
    evaluate("vreflection_tiny", ["blink"], tmp_path, data, batch_size=4)
    # 56 x 56 pixels are 2 x 2 merged patches, 84 x 84 are 3 x 3.
    assert sorted(prompt.count("<|image_pad|>") for prompt in asked) == [4] * 5 + [4 + 9] * 5


def test_questions_of_gqa_find_their_pictures_and_ask_as_in_training(data, scripted, tmp_path):
    asked = scripted(lambda prompt: "yes")
    report = evaluate("vreflection_tiny", ["gqa"], tmp_path, data, batch_size=2)
    assert report["tasks"]["gqa"]["data"] == {"folder": "gqa"}
    assert sorted((prompt.count("<|image_pad|>"), re.search(r"thing \d", prompt)[0]) for prompt in asked) == [
        (4, "thing 0"),
        (4, "thing 2"),
        (9, "thing 1"),
    ]
    # The row of GQA's reader, rendered up to its answer.
    question = [{"type": "image"}, {"type": "text", "text": f"What is thing 1?{SHORT_ANSWER}"}]
    processor = load_checkpoint(EMBEDDED, "cpu")[1]
    trained = processor.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    assert trained in [re.sub(r"(<\|image_pad\|>)+", r"\1", prompt) for prompt in asked]


def test_a_question_of_gqa_without_its_picture_ends_the_run_before_it_begins(small, scripted, tmp_path):
    asked = scripted(lambda prompt: "A")
    write_files(tmp_path, "gqa", lambda row: None if row["id"] == "n2" else row)
    with pytest.raises(InputError, match="item gqa 20131: its image is missing"):
        evaluate("vreflection_tiny", ["gqa"], tmp_path / "run", tmp_path)
    shutil.rmtree(tmp_path / "gqa/testdev_balanced_images")
    with pytest.raises(InputError, match=r"gqa/testdev_balanced_images: no files testdev\*\.parquet"):
        evaluate("vreflection_tiny", ["gqa"], tmp_path / "run", tmp_path)
    assert asked == []


def test_the_embedded_checkpoint_answers(data, tmp_path):
    report = evaluate(
        "vreflection_tiny", ["vstar"], tmp_path, data, limit=2, reflect=True, latent_steps=4, latent_feedback="dac"
    )
    assert counts(report["tasks"]["vstar"]["reflection_rate"]) == (2, 2)
    answers = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [answer["latent_tokens"] for answer in answers] == [4, 4]
    assert all("<|lvr|>" in answer["raw"] and "<|" not in answer["text"] for answer in answers)

    plain = evaluate("vreflection_tiny", ["vstar"], tmp_path / "plain", data, limit=2, latent_steps=0)
    assert counts(plain["tasks"]["vstar"]["reflection_rate"]) == (0, 2)
    assert plain["options"]["max_pixels"] == report["options"]["max_pixels"]
    assert plain["command"] == (
        "vreflection evaluate vreflection_tiny --tasks vstar --limit 2 --latent-steps 0 --latent-feedback dac "
        "--min-pixels 784 --max-pixels 451584 --batch-size 1 --dtype float32 --attn-implementation sdpa"
    )


@pytest.mark.parametrize(
    "name, id, column",
    [("mmvp", 3, "image"), ("vstar", "1", "image"), ("blink", "val_Jigsaw_2", "image_1"), ("hrbench4k", 5, "image"),
     ("mmerealworld_lite", 2, "bytes")],
)  # fmt: skip
def test_a_missing_picture_ends_the_run_before_it_begins(name, id, column, small, scripted, tmp_path):
    def lose(row):
        return row | {column: None} if id in row.values() else row

    asked = scripted(lambda prompt: "A")
    with pytest.raises(InputError, match=rf"{name} {id}: its image is missing"):
        evaluate("vreflection_tiny", [name], tmp_path / "run", write_files(tmp_path, name, lose))
    assert asked == []


def test_a_damaged_picture_ends_the_run_with_its_id(small, scripted, tmp_path):
    def cut(row):
        file = io.BytesIO()
        row["image"].resize((280, 280)).effect_spread(9).save(file, "PNG")
        return row | {"image": {"bytes": file.getvalue()[: 500 if row["Index"] == 4 else None], "path": None}}

    scripted(lambda prompt: "A")
    with pytest.raises(InputError, match="item 4: a picture can't be opened .*damaged or unreadable"):
        evaluate("vreflection_tiny", ["mmvp"], tmp_path / "run", write_files(tmp_path, "mmvp", cut))
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("name, where", [("mmvp", "mmvp"), ("blink", "blink Jigsaw")])
def test_a_missing_item_ends_the_run_before_it_begins(name, where, small, tmp_path):
    def lose(row):
        return None if row.get("idx", row.get("Index")) in (2, "val_Jigsaw_1") else row

    with pytest.raises(InputError, match=f"{where}: . items instead of"):
        evaluate("vreflection_tiny", [name], tmp_path / "run", write_files(tmp_path, name, lose))


def test_the_published_counts_hold(files, tmp_path):
    with pytest.raises(InputError, match="vstar: 3 items instead of 191"):
        evaluate("vreflection_tiny", ["vstar"], tmp_path, files)


def test_a_run_goes_on_and_asks_nothing_twice(data, scripted, tmp_path):
    class Killed(BaseException):
        pass

    def die(prompt):
        if len(asked) > 6:
            raise Killed
        return "A"

    asked = scripted(die)
    wanted = ["blink", "vstar"]
    with pytest.raises(Killed):
        evaluate("vreflection_tiny", wanted, tmp_path, data, batch_size=3)
    (file,) = tmp_path.iterdir()
    with file.open("a") as answers:  # a line that the kill cut off
        answers.write('{"task": "vreflection_vstar", "index": 0, "repe')
    before = sorted(asked[:6])

    asked = scripted(lambda prompt: "A")
    report = evaluate("vreflection_tiny", wanted, tmp_path, data, batch_size=2)
    again = sorted(asked)
    assert len(again) == 13 - 6

    whole = scripted(lambda prompt: "A")
    uninterrupted = evaluate("vreflection_tiny", wanted, tmp_path / "whole", data, batch_size=4)
    assert sorted(whole) == sorted(before + again)
    for name in ("blink", "vstar"):
        assert report["tasks"][name]["authors"] == uninterrupted["tasks"][name]["authors"]

    asked = scripted(lambda prompt: "A")
    evaluate("vreflection_tiny", wanted, tmp_path, data)
    assert asked == []


def test_answers_of_another_run_are_not_mixed_in(data, scripted, tmp_path):
    scripted(lambda prompt: "A")
    evaluate("vreflection_tiny", ["vstar"], tmp_path / "run", data)
    with pytest.raises(InputError, match="latent_steps = 8, not 4"):
        evaluate("vreflection_tiny", ["vstar"], tmp_path / "run", data, latent_steps=4)

    other = write_files(tmp_path, "vstar", lambda row: row | {"text": "Another?\n(A) red\n(B) blue"})
    with pytest.raises(InputError, match="item 0 of vreflection_vstar was another question"):
        evaluate("vreflection_tiny", ["vstar"], tmp_path / "run", other)


WORKER = """
import os, signal, sys
from pathlib import Path
from pytest import MonkeyPatch
from benchmark_files import shrink
from vreflection_hub_card.evaluation.harness.model import VReflection
from vreflection_hub_card.evaluation.harness.run import evaluate

data, output, kill = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "kill"
answer, batches = VReflection._answer, 0

def count_and_answer(self, batch):
    global batches
    batches += 1
    if kill and batches == 2 and self.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, batch)

VReflection._answer = count_and_answer
shrink(MonkeyPatch())
evaluate("vreflection_tiny", ["vstar", "hrbench4k"], output, data, device="cpu", batch_size=2)
"""


@pytest.mark.slow
def test_two_processes_killed_and_resumed_say_what_one_says(data, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def run(what):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments = [str(script), str(data), str(tmp_path / "two"), what]
        environment = os.environ | {
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": str(Path(__file__).parent),
        }
        return subprocess.run(launch + arguments, env=environment, capture_output=True, timeout=100)

    assert run("kill").returncode != 0
    assert not (tmp_path / "two" / "results.json").exists()
    given = lines(tmp_path / "two" / "answers.rank1.jsonl")
    assert len(given) == 1 + 2  # the settings and a batch
    finished = run("finish")
    assert finished.returncode == 0, finished.stderr.decode()[-3000:]
    assert lines(tmp_path / "two" / "answers.rank1.jsonl")[:3] == given
    answers = [
        json.loads(line) for rank in (0, 1) for line in lines(tmp_path / "two" / f"answers.rank{rank}.jsonl")[1:]
    ]
    assert len({(answer["task"], answer["index"]) for answer in answers}) == len(answers) == 11

    evaluate("vreflection_tiny", ["vstar", "hrbench4k"], tmp_path / "one", data, device="cpu", batch_size=2)
    reports = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert [report["machine"]["processes"] for report in reports] == [1, 2]
    for name in ("vstar", "hrbench4k"):
        one, two = (report["tasks"][name] for report in reports)
        assert one["strict"] == two["strict"] and one["authors"] == two["authors"]
    texts = [
        [(row["id"], row["raw"]) for row in map(json.loads, lines(tmp_path / name / "samples.jsonl"))]
        for name in ("one", "two")
    ]
    assert texts[0] == texts[1]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
