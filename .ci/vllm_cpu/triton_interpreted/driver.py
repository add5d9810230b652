"""The driver that lets Triton's interpreter run kernels on tensors in main memory."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError("There is no compiler for this machine: set TRITON_INTERPRET=1.")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        raise RuntimeError("Interpreted kernels are not worth timing.")
