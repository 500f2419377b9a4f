"""The launcher, the check of configs, LoRA, and LAVIS's runners made portable and resumable."""
