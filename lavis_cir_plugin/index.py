"""The former place of :mod:`lavis_cir_plugin.ranking.index`."""

from lavis_cir_plugin.ranking.index import Index, build_index, load_index, recall_against_exact

__all__ = ["Index", "build_index", "load_index", "recall_against_exact"]
