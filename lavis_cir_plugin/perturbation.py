"""The former place of :mod:`lavis_cir_plugin.methods.wrf4cir.perturbation`."""

from lavis_cir_plugin.methods.wrf4cir.perturbation import LowRank, WeightPerturbation, ascent_step

__all__ = ["LowRank", "WeightPerturbation", "ascent_step"]
