"""Models that belong to no single method, and the parts that several models share."""

import lavis_cir_hook

# Registration follows the import of LAVIS; it must not find a module of this folder half imported.
lavis_cir_hook.import_lavis()
