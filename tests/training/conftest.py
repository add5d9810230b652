import pytest
import torch

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor
from vreflection_training.tiny import save_tiny_backbone


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A V-Reflection folder with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("stock"))
    for part in VReflectionForConditionalGeneration.from_backbone(backbone, dtype=torch.float32):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor(checkpoint):
    return VReflectionProcessor.from_pretrained(checkpoint)


@pytest.fixture
def model(checkpoint):
    """A fresh model with a BCM that counts as trained."""
    model = VReflectionForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        model.model.bcm.norm.bias.fill_(0.01)
    return model
