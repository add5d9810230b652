"""What the task files refer to; the harness finds it by this file's name."""

from vreflection_hub_card.evaluation.harness.task import BenchmarkTask


__all__ = ["BenchmarkTask"]
