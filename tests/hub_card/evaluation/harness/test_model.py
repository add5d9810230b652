"""The model as lmms-eval sees it: found by its name, and used by tasks that aren't ours."""

import json

import pytest
from benchmark_files import picture
from datasets import Dataset
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.evaluation.harness.model import VReflection, decoding


STOCK_TASK = """
task: stock
dataset_path: parquet
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: generate_until
doc_to_visual: image
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {max_new_tokens: 16}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def stock_tasks(tmp_path):
    """A task as the harness's own are: short answers, a stop string put in, compared as they are."""
    rows = [{"question": f"Question {n}?", "answer": "B", "image": picture(n)} for n in range(2)]
    Dataset.from_list(rows).to_parquet(tmp_path / "stock.parquet")
    (tmp_path / "stock.yaml").write_text(STOCK_TASK.replace("FILE", str(tmp_path / "stock.parquet")))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def requests(model, questions, settings=None):
    """Requests of a task with a picture, the first larger than the others."""
    rows = [{"text": text, "image": picture(n, 84 if n == 0 else 56)} for n, text in enumerate(questions)]
    model.task_dict["task"] = {"test": rows}

    def messages(row):
        return [
            {
                "role": "user",
                "content": [{"type": "image", "url": row["image"]}, {"type": "text", "text": row["text"]}],
            }
        ]

    return [
        Instance(
            "generate_until",
            (text, messages, settings or {}, index, "task", "test"),
            0,
            {"task": "task", "doc_id": index, "repeats": 1},
        )
        for index, text in enumerate(questions)
    ]


def test_found_by_the_entry_point_with_options_from_the_command_line():
    assert get_model("vreflection") is VReflection
    model = VReflection.create_from_arg_string(
        "latent_steps=4,latent_feedback=dac,reflect=True,max_pixels=50000,dtype=bfloat16,attn_implementation=eager",
        {"batch_size": "2", "device": "cpu"},
    )
    assert model.options == {
        "latent_steps": 4,
        "latent_feedback": "dac",
        "reflect": True,
        "latent_tolerance": None,
        "reflect_threshold": None,
        "max_reflections": None,
        "min_pixels": 784,
        "max_pixels": 50_000,
        "batch_size": 2,
        "dtype": "bfloat16",
        "attn_implementation": "eager",
    }
    assert str(model.model.dtype) == "torch.bfloat16"


def test_a_stock_task_gets_the_bare_answer(stock_tasks, scripted):
    scripted(lambda prompt: "I see\n\n<answer> B </answer> and more")
    outcome = simple_evaluate(
        VReflection(), tasks=["stock"], task_manager=stock_tasks, bootstrap_iters=0, process_docs_parallel=1
    )
    assert outcome["results"]["stock"]["exact_match,none"] == 1


def test_the_samples_of_a_stock_task_tell_who_reflected(stock_tasks):
    outcome = simple_evaluate(
        VReflection(reflect=True, latent_steps=3), tasks=["stock"], task_manager=stock_tasks, bootstrap_iters=0
    )
    assert [sample["token_counts"][0]["reasoning_tokens"] for sample in outcome["samples"]["stock"]] == [3, 3]


def test_a_batch_answers_as_each_alone():
    questions = ["Where?", "What colour is the letter in the middle of the picture?", "Is it?"]
    answers = []
    for batch_size in (1, 3):
        model = VReflection(batch_size=batch_size, reflect=True)
        answers.append(model.generate_until(requests(model, questions)))
    assert answers[0] == answers[1]


def test_max_pixels_bounds_what_the_model_sees(scripted):
    asked = scripted(lambda prompt: "A")
    model = VReflection(max_pixels=56 * 56)
    model.generate_until(requests(model, ["Where?"]))
    assert asked[0].count("<|image_pad|>") == 4


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"max_new_tokens": 16, "until": ["\n\n"]}, {"max_new_tokens": 512, "do_sample": False}),
        ({"max_new_tokens": 2048, "temperature": 0}, {"max_new_tokens": 2048, "do_sample": False}),
        ({"do_sample": True, "temperature": 0}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.7}, {"do_sample": False, "temperature": None}),
        ({"num_beams": 3}, {"num_beams": 3, "do_sample": False}),
    ],
)
def test_decoding(settings, expected):
    arguments = decoding(settings)
    assert expected.items() <= arguments.items()
    assert "until" not in arguments and arguments["max_new_tokens"] >= 512


def test_raw_outputs_are_written_as_they_come(scripted, tmp_path):
    def say(prompt):
        if "third" in prompt:
            raise RuntimeError
        return "<answer>B</answer>"

    scripted(say)
    model = VReflection(answers=tmp_path)
    with pytest.raises(RuntimeError):
        model.generate_until(requests(model, ["first", "second", "third"]))
    header, *answers = [json.loads(line) for line in (tmp_path / "answers.rank0.jsonl").read_text().splitlines()]
    assert header["settings"]["latent_steps"] == 8
    assert [(row["index"], row["raw"], row["reflected"]) for row in answers] == [
        (index, "<answer>B</answer><|im_end|>", False) for index in (0, 1)
    ]


@pytest.mark.parametrize(
    "options, fragment",
    [
        ({"latent_steps": -1}, "must not be negative"),
        ({"latent_steps": 0, "reflect": True}, "contradict"),
        ({"latent_feedback": "both"}, "must be one of"),
        ({"min_pixels": 10**7}, "not above `max_pixels`"),
        ({"batch_size": 0}, "at least 1"),
        ({"revision": "main"}, "only a model on the Hub"),
        ({"pretrained": "no.such/model/at/all"}, "no such folder"),
    ],
)
def test_options_that_cannot_be_followed(options, fragment):
    with pytest.raises(InputError, match=fragment):
        VReflection(**options)
