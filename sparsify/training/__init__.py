"""What a training loop is put together from: schedules, steps, cadences, sinks, checkpoints."""
