"""Benchmarks of composed image retrieval: readers turn annotation files into queries, galleries and metrics."""
