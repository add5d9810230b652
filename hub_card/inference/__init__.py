"""Asking a checkpoint: loading it, answers, and where it looked."""
