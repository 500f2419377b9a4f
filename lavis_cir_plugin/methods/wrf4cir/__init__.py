"""Adversarial weight perturbation around the optimizer of any LAVIS task. Method card: docs/wrf4cir.md."""
