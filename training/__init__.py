"""Training recipes; installed and imported as `promptloop_training`."""
