"""``python -m lavis.train``: the import hook serves this file under that name while LAVIS ships none."""

from lavis_cir_plugin.training.launcher import main

if __name__ == "__main__":
    main("train")
