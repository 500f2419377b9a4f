"""Preferences between right images and mined wrong ones. Method card: docs/retrieval_dpo.md."""
