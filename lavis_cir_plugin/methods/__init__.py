"""The methods, one folder each: pure functions that know no LAVIS, and adapters that connect them to LAVIS."""

import lavis_cir_hook

# Registration follows the import of LAVIS; it must not find a module of this folder half imported.
lavis_cir_hook.import_lavis()
