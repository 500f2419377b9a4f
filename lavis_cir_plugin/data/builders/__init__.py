"""LAVIS's data set builders for benchmarks, captions and drawn questions."""

import lavis_cir_hook

# Registration follows the import of LAVIS; it must not find a module of this folder half imported.
lavis_cir_hook.import_lavis()
