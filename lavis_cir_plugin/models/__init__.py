"""Models: each file registers one with LAVIS."""
