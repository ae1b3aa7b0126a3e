"""The training loops and what surrounds them: checkpoints, logs, run folders."""
