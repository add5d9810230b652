"""Shared fixtures: an untrained tiny model, made once a session. Tests must leave it as they found it."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The matrices are tiny: a second thread gains little, and on a busy machine waiting for it costs tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from randomise import randomise  # noqa: E402
from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers.utils import logging  # noqa: E402

from modeling_vreflection import VReflectionForConditionalGeneration  # noqa: E402
from vreflection_training.tiny import save_tiny_backbone  # noqa: E402


OURS = "(modeling_vreflection|vreflection_hub_card|vreflection_training)"


def pytest_configure(config):
    # A deprecated argument or name that our code still uses: the next release breaks it.
    config.addinivalue_line("filterwarnings", f"error::FutureWarning:{OURS}")
    config.addinivalue_line("filterwarnings", f"error::DeprecationWarning:{OURS}")
    torch.set_num_threads(min(2, int(os.environ["OMP_NUM_THREADS"])))
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A stock Qwen2.5-VL folder, with layers so strong that what is said depends on what is fed, latents included."""
    folder = save_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # as they come, the tied embeddings make the model repeat its last token
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim == 2:
                parameter *= 1.4
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model(backbone):
    """Makes a model, with config fields as arguments, whose BCM and DAC are far from their initial symmetry.

    Unless it is asked for, they don't know where patches lie.
    """

    def make(**config) -> VReflectionForConditionalGeneration:
        torch.manual_seed(0)
        config = {"patch_positions": "none", **config}
        model, _ = VReflectionForConditionalGeneration.from_backbone(backbone, dtype=torch.float32, **config)
        for seed, module in enumerate((model.model.bcm, model.model.dac)):
            if module is not None:
                randomise(module, seed)
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """The model of the session, float32, in evaluation mode."""
    return make_model()


@pytest.fixture(scope="session")
def processor(backbone):
    """The processor that goes with `model`."""
    return VReflectionForConditionalGeneration.from_backbone(backbone)[1]


@pytest.fixture(scope="session")
def ids(processor):
    """Ids of the start, slot and end token."""
    return processor.tokenizer.convert_tokens_to_ids(["<|sovt|>", "<|lvr|>", "<|eovt|>"])


@pytest.fixture(scope="session")
def stock(backbone, model):
    """The stock class with the same weights: what independent re-computations run on."""
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone, dtype=torch.float32)
    with torch.no_grad():  # the three tokens are the only rows that differ
        stock.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
    return stock
