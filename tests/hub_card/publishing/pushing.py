"""Run by test_push_to_hub.py in a process of its own: pushes as one does without `vreflection publish`."""

import sys
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars

from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_hub_card.inference.checkpoints import load_checkpoint
from vreflection_training import VReflectionSFTConfig, VReflectionSFTTrainer


folder, pushed, trained, output = Path(sys.argv[1]), *sys.argv[2:]
disable_progress_bars()
torch.set_num_threads(1)
model, processor = load_checkpoint(folder, "cpu")
model.push_to_hub(pushed)
processor.push_to_hub(pushed)

args = VReflectionSFTConfig(
    output,
    stage="1",
    max_steps=2,
    save_steps=1,
    per_device_train_batch_size=1,
    push_to_hub=True,
    hub_model_id=trained,
    hub_always_push=True,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    disable_tqdm=True,
    dataloader_pin_memory=False,
    report_to="none",
)
trainer = VReflectionSFTTrainer(model, args, processing_class=processor, train_dataset=glyphsearch_dataset("train", 4))
trainer.train()
trainer.push_to_hub()
