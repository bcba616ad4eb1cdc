"""Parts of a training step: the forward plan and its passes, losses, optimizers, schedules."""
