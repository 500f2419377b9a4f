"""The sub-commands of ``lavis-cir``, one per module with a function ``add_command``."""
