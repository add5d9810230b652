"""The paper's benchmarks as task files of lmms-eval: its `include_path`."""
