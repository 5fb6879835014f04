"""What steering costs, as ratios of two sides measured in one process: `python -m trl_steer.eval.benchmarks`."""
