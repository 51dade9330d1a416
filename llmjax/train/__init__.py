"""The training loop and what it needs: schedules and optimizers, the jitted step, checkpoints, metrics."""
