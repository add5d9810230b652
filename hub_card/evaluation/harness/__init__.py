"""V-Reflection on lmms-eval: the model, the paper's benchmarks as tasks, and a run that survives a kill.

Needs `pip install "vreflection[eval]"`; nothing outside this package imports lmms-eval.
"""
