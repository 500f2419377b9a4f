"""Tasks: each file registers one with LAVIS."""
