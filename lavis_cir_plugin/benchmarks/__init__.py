"""Benchmarks of composed image retrieval: annotation files in, queries, galleries, protocol and metrics out."""
