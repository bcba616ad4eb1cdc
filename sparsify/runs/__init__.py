"""A training run and its folder: checkpoints, signals, disk, logs; loading what a run saved."""
