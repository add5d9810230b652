"""Gets what a run starts from: model, processor and data set."""

import tempfile
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoConfig

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration, VReflectionProcessor
from vreflection_hub_card.glyphsearch import glyphsearch_curriculum, glyphsearch_dataset

from .tiny import save_tiny_backbone


GLYPHSEARCH = {"glyphsearch": glyphsearch_dataset, "glyphsearch_curriculum": glyphsearch_curriculum}


def load_model_and_processor(
    model_name_or_path: str, **kwargs
) -> tuple[VReflectionForConditionalGeneration, VReflectionProcessor]:
    """Loads a V-Reflection checkpoint, or makes one from a stock Qwen2.5-VL checkpoint."""
    if AutoConfig.from_pretrained(model_name_or_path).model_type != VReflectionConfig.model_type:
        return VReflectionForConditionalGeneration.from_backbone(model_name_or_path, **kwargs)
    model = VReflectionForConditionalGeneration.from_pretrained(model_name_or_path, **kwargs)
    return model, VReflectionProcessor.from_pretrained(model_name_or_path)


def build_tiny(seed: int, **kwargs) -> tuple[VReflectionForConditionalGeneration, VReflectionProcessor]:
    """Makes the untrained tiny model, which depends on the seed alone."""
    with tempfile.TemporaryDirectory() as folder:
        return VReflectionForConditionalGeneration.from_backbone(save_tiny_backbone(folder, seed), **kwargs)


def load_rows(dataset_name: str, options: dict[str, Any] | None = None) -> Dataset | IterableDataset:
    """Loads a data set in the project's message format: GlyphSearch by name, else by `datasets.load_dataset`."""
    options = dict(options or {})
    if dataset_name in GLYPHSEARCH:
        return GLYPHSEARCH[dataset_name](**options)
    return load_dataset(dataset_name, **{"split": "train", **options})
