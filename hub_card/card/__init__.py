"""The model card: rendered from a checkpoint, from what its training left, and from result files; never from memory."""

from .card_check import CARD, check_card, load_card
from .facts import TRAINING_FACTS, read_training_facts, write_training_facts
from .render import render_card, save_card, write_card


__all__ = [
    "CARD",
    "TRAINING_FACTS",
    "check_card",
    "load_card",
    "read_training_facts",
    "render_card",
    "save_card",
    "write_card",
    "write_training_facts",
]
