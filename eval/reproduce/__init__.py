"""Studies: grids of runs, their engines and their record; sweeps over learning rates; comparisons of runs."""
