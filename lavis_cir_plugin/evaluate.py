"""The command ``python -m lavis.evaluate``: the import hook runs this file under a name that LAVIS lacks."""

from lavis_cir_plugin.training.launcher import main

if __name__ == "__main__":
    main("evaluate")
