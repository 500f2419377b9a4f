"""Retrieval-DPO: preferences between right images and mined wrong ones, by DPO (arXiv 2305.18290).

Method card: docs/retrieval_dpo.md.

Pure functions:

* ``losses``: losses on the scores of a policy and a reference policy, and their settings.
* ``mining``: hard negatives of queries among the training images, and the settings of the search.
* ``negatives_sheet``: a picture of queries with their negatives.

Adapters to LAVIS:

* ``preference_model``: a model's loss replaced by the preferences', and the frozen reference policy.
* ``task``: the task ``retrieval_dpo``.
"""
