"""The training run: its config, its plan, the loop, one update, the reference, checkpoints and metrics."""
