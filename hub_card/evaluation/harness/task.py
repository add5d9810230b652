"""A benchmark of the paper as a task of lmms-eval. What is asked and how it is scored is the parent package's."""

from statistics import fmean

from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import ImageFile

from ..benchmarks import BENCHMARKS
from ..scorers import SCORERS
from .data import check_rows, load_benchmark


PREFIX = "vreflection_"

# The harness's import tells Pillow to fill what is missing of a damaged picture with grey; a question about it is void.
ImageFile.LOAD_TRUNCATED_IMAGES = False


class BenchmarkTask(ConfigurableMessagesTask):
    """One of `BENCHMARKS`, asked as the authors do and scored by each of its scorers.

    Args:
        config (`dict`): The task's YAML file. Its `task` is `vreflection_` and a name of `BENCHMARKS`; its
            `dataset_path`, if any, is a local folder to load instead of the data set on the Hub, see `load_benchmark`.

    Raises:
        InputError: Data that isn't complete, see `check_rows`.
    """

    def __init__(self, config: dict):
        self.benchmark = BENCHMARKS[config["task"].removeprefix(PREFIX)]
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
        content = [{"type": "image", "url": picture} for picture in self.benchmark.item(doc).pictures()]
        content.append({"type": "text", "text": self.doc_to_text(doc)})
        return [{"role": "user", "content": content}]

    def process_results(self, doc: dict, results: list[str]) -> dict[str, dict]:
        """What each scorer makes of the answer."""
        item = self.benchmark.item(doc)
        verdicts = {}
        for name in self.benchmark.scorers:
            letter = SCORERS[name](results[0], item.options)
            facts = {"id": item.id, "groups": item.groups, "answer": item.answer}
            verdicts[name] = facts | {"letter": letter, "correct": letter == item.answer}
        return verdicts

    def aggregation(self) -> dict:
        """The harness's own table shows the accuracy; a run's file holds the sub-scores."""
        return dict.fromkeys(self.benchmark.scorers, lambda verdicts: fmean(one["correct"] for one in verdicts))

    def higher_is_better(self) -> dict:
        return dict.fromkeys(self.benchmark.scorers, True)
