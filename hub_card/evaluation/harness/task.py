"""A benchmark of the paper as a task of lmms-eval. What is asked and how it is scored is the parent package's."""

from dataclasses import asdict, replace

from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import ImageFile

from ..benchmarks import BENCHMARKS, Benchmark
from ..scorers import SCORERS
from .data import check_rows, load_benchmark


PREFIX = "vreflection_"

# The harness's import tells Pillow to fill what is missing of a damaged picture with grey; a question about it is void.
ImageFile.LOAD_TRUNCATED_IMAGES = False


class BenchmarkTask(ConfigurableMessagesTask):
    """One of `BENCHMARKS`, asked as the authors do and scored by each of its scorers.

    Args:
        config (`dict`): The task's YAML file, see `task_benchmark`. Its `dataset_path`, if any, is a local folder to load
            instead of the data set on the Hub, see `load_benchmark`.

    Raises:
        InputError: Data that isn't complete, see `check_rows`.
    """

    def __init__(self, config: dict):
        self.benchmark = task_benchmark(config)
        fields = {name: value for name, value in config.items() if name != "class"}
        super().__init__(config=fields | {"test_split": self.benchmark.split})

    def download(self, dataset_kwargs=None):
        """Loads all subsets as one split and checks them."""
        rows = load_benchmark(self.benchmark, self.config.dataset_path)
        check_rows(self.benchmark, rows)
        # Encoded pictures cost little, so there is no need for a second copy of the data without them.
        self.dataset = self.dataset_no_image = {self.benchmark.split: rows}

    def doc_to_text(self, doc: dict) -> str:
        return self.benchmark.item(doc).question + self.benchmark.instruction

    def doc_to_target(self, doc: dict) -> str:
        return self.benchmark.item(doc).answer

    def doc_to_messages(self, doc: dict, **kwargs) -> list[dict]:
        """The user's turn: the pictures, then the text."""
        item = self.benchmark.item(doc)
        content = [{"type": "image", "url": picture} for picture in item.pictures()]
        content.append({"type": "text", "text": item.question + self.benchmark.instruction})
        return [{"role": "user", "content": content}]

    def process_results(self, doc: dict, results: list[str]) -> dict[str, dict]:
        """What each scorer makes of the answer."""
        item = self.benchmark.item(doc)
        facts = {"id": item.id, "groups": item.groups, "answer": item.answer}
        return {
            name: facts | asdict(SCORERS[name](results[0], item.answer, item.options))
            for name in self.benchmark.scorers
        }

    def aggregation(self) -> dict:
        """The harness's own table shows the accuracy; a run's file holds the sub-scores."""
        return dict.fromkeys(self.benchmark.scorers, accuracy)

    def higher_is_better(self) -> dict:
        return dict.fromkeys(self.benchmark.scorers, True)


def task_benchmark(config: dict) -> Benchmark:
    """The benchmark of a task's file.

    Args:
        config (`dict`): Its `task` is `vreflection_` and a name of `BENCHMARKS`. Its `metadata` may hold `counts`: the
            items of each subset, where the data isn't the whole data set.
    """
    benchmark = BENCHMARKS[config["task"].removeprefix(PREFIX)]
    counts = (config.get("metadata") or {}).get("counts")
    return benchmark if counts is None else replace(benchmark, counts=counts)


def accuracy(results: list[dict]) -> float:
    """The share of right answers."""
    return sum(one["correct"] for one in results) / len(results)
