"""Runners: each file registers one with LAVIS, except ``portable`` and ``resumable``, which they share."""
