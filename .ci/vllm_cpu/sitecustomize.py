"""What vLLM needs on a machine without a GPU; takes effect where this folder is on PYTHONPATH."""

import torch


# torchvision of the package index is built for CUDA. Beside a torch without it, it doesn't load its operators, but describes
# two of them, which fails where they don't exist.
operators = torch.library.Library("torchvision", "DEF")
operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
