"""``perl-vlm plan``: peak memory and time of a step from a model's config and a run's settings, before anything runs.

Shapes come from the model on the meta device (``shapes.py``), what autograd keeps from a dry run there (``dryrun.py``,
``passes.py``), floating-point operations from ``flops.py``; ``memory.py`` and ``schedule.py`` put them together.
"""
