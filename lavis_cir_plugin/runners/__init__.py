"""Runners: each file registers one with LAVIS, except ``portable``, which they share."""
