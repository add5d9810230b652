"""Measuring a checkpoint, task by task. A task takes a model, its processor and options, and returns its results."""

from .glyphsearch import evaluate_glyphsearch


TASKS = {"glyphsearch": evaluate_glyphsearch}
