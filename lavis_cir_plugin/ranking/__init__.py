"""Scores, ranks and metrics of galleries, and the index that finds candidates in large ones."""
