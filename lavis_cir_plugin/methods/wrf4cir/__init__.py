"""WRF4CIR: adversarial weight perturbation around the optimizer of any LAVIS task (arXiv 2604.05583).

Method card: docs/wrf4cir.md.

Pure functions:

* ``perturbation``: settings of the perturbation, and its step along a direction.
* ``frozen_memo``: outputs of frozen modules, remembered between the two passes of a step.
* ``optimizer``: the optimizer that owns the perturbation, and the model call that applies it.

Adapters to LAVIS:

* ``runner``: the runners ``runner_wrf4cir`` and ``runner_wrf4cir_iter``.
* ``generalisation_gap``: overfitting and flatness of finished runs, for ``lavis-cir gap``.
"""
