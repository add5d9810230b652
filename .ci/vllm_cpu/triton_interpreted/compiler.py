"""A compiler in name only: with TRITON_INTERPRET=1 nothing is compiled."""

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict) -> dict:
        return options

    def add_stages(self, stages, options, language):
        raise RuntimeError("There is no compiler for this machine: set TRITON_INTERPRET=1.")

    def load_dialects(self, context):
        pass

    def get_module_map(self) -> dict:
        return {}
