"""V-Reflection on lmms-eval: the model, the paper's benchmarks as tasks, and runs that continue after they were killed.

Needs `pip install "vreflection[eval]"`; nothing outside this package imports lmms-eval.
"""
