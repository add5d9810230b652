import devices
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_training import VReflectionSFTConfig, VReflectionSFTTrainer
from vreflection_training.tiny import save_tiny_backbone


@pytest.fixture(scope="session")
def checkpoint(request, tmp_path_factory):
    """A V-Reflection folder with random weights, on the backbone of a test's parameter or of `--backbone`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model_type = getattr(request, "param", request.config.getoption("--backbone"))
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("stock"), model_type=model_type)
    for part in VReflectionForConditionalGeneration.from_backbone(backbone, dtype=torch.float32):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture
def model(checkpoint):
    """A fresh model with a BCM that counts as trained."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).to(devices.DEVICE)
    with torch.no_grad():
        model.model.bcm.norm.bias.fill_(0.01)
    return model


@pytest.fixture(scope="session")
def rows():
    return glyphsearch_dataset("train", 8)


@pytest.fixture
def make_trainer(tmp_path, model, processor, rows):
    def make(dataset=rows, data_collator=None, trained=model, peft_config=None, eval_dataset=None, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": devices.DEVICE.type == "cpu",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "max_grad_norm": 1e9,
            "report_to": "none",
        }
        args = VReflectionSFTConfig(**{**defaults, **options})
        return VReflectionSFTTrainer(
            trained,
            args,
            processing_class=processor,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            peft_config=peft_config,
        )

    return make
