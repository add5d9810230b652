"""Local data, and a model that says what a test wants."""

import datasets
import pytest
import torch
from benchmark_files import ROWS, shrink, write_files
from torch.nn.utils.rnn import pad_sequence

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """What `datasets` writes goes where the tests' files go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with the tests' items of each benchmark."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in ROWS:
        write_files(folder, name)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Benchmarks as large as the tests' files."""
    shrink(monkeypatch)


@pytest.fixture
def data(files, small):
    """The folder of the tests' items, which count as complete."""
    return files


@pytest.fixture
def scripted(monkeypatch):
    """Makes every model say what a function of the prompt returns, in place of generating; returns the prompts asked.

    What is before and after generation, batches and decoding, runs as it is.
    """

    def script(say):
        processor = load_checkpoint(EMBEDDED, "cpu")[1]
        tokenizer, asked = processor.tokenizer, []
        stock_generate = VReflectionForConditionalGeneration.generate

        def generate(self, input_ids, attention_mask, **kwargs):
            if kwargs.get("max_new_tokens") == 1:  # the question that a checkpoint is asked when it is loaded
                return stock_generate(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            assert attention_mask[:, -1].all()  # padded on the left
            prompts = [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask)]
            asked.extend(prompts)
            end = self.generation_config.eos_token_id[0]
            said = [torch.tensor(tokenizer.encode(say(prompt)) + [end]) for prompt in prompts]
            said = pad_sequence(said, batch_first=True, padding_value=tokenizer.pad_token_id)
            return torch.cat([input_ids, said], 1)

        monkeypatch.setattr(VReflectionForConditionalGeneration, "generate", generate)
        return asked

    return script
