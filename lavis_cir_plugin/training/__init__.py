"""Launcher, checks of a config, LoRA, and LAVIS's runners made portable and resumable."""

import lavis_cir_hook

# Registration follows the import of LAVIS; it must not find a module of this folder half imported.
lavis_cir_hook.import_lavis()
