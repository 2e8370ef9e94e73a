"""From flags to a trained model: configuration, optimizer, step, checkpoints, loop, samples."""
