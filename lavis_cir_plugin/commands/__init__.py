"""What ``lavis-cir`` does; a module with ``add_command`` is found by itself."""
