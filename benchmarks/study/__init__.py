"""The parts of wrf_study.py: design, runs, results, intervals and the page."""
