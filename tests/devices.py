"""Where the tests of models and trainers run: what `pytest --device` says."""

import torch


DEVICE = torch.device("cpu")  # read it as `devices.DEVICE`, since conftest.py sets it
