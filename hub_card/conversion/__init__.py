"""Turning other layouts of the same weights into ours."""
