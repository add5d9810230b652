"""Shared fixtures: an untrained tiny model, made once a session. Tests must leave it as they found it."""

import os
from functools import partial


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The matrices are tiny: a second thread gains little, and on a busy machine waiting for it costs tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import devices  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tiny_models import make_random_model, make_stock, save_strong_backbone  # noqa: E402
from transformers.utils import logging  # noqa: E402

from modeling_vreflection import VReflectionForConditionalGeneration  # noqa: E402


OURS = "(modeling_vreflection|vreflection_hub_card|vreflection_training)"


def pytest_addoption(parser):
    parser.addoption(
        "--backbone",
        choices=["qwen2_5_vl", "qwen3_vl"],
        default="qwen2_5_vl",
        help="whose tiny form tests/modeling runs on",
    )
    parser.addoption("--device", type=torch.device, default="cpu", help="where the tests of models and trainers run")


def pytest_configure(config):
    devices.DEVICE = config.getoption("--device")
    torch.backends.cudnn.allow_tf32 = False  # the convolution of the patches would round to 10 bits
    # A deprecated argument or name that our code still uses: the next release breaks it.
    config.addinivalue_line("filterwarnings", f"error::FutureWarning:{OURS}")
    config.addinivalue_line("filterwarnings", f"error::DeprecationWarning:{OURS}")
    torch.set_num_threads(min(2, int(os.environ["OMP_NUM_THREADS"])))
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory, pytestconfig):
    """A stock folder, of Qwen2.5-VL unless `--backbone` says another; see `save_strong_backbone`."""
    return save_strong_backbone(tmp_path_factory.mktemp("backbone"), pytestconfig.getoption("--backbone"))


@pytest.fixture(scope="session")
def make_model(backbone):
    """See `make_random_model`."""
    return partial(make_random_model, backbone, devices.DEVICE)


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
    return make_stock(backbone, model)
