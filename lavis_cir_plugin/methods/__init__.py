"""One folder per method: its pure functions first, its adapters to LAVIS after them."""

import lavis_cir_hook

# Registration follows the import of LAVIS; it must not find a module of this folder half imported.
lavis_cir_hook.import_lavis()
