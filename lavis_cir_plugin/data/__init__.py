"""Data sets over benchmarks and captions, LAVIS's builders for them, and what feeds a training loop."""
