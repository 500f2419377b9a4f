"""Data sets over benchmarks and captions, LAVIS's builders of them, cached features, and loaders that can resume."""
