"""What every layer may use: files that are written whole, processes, random state, checkpoints, settings, sentences."""
