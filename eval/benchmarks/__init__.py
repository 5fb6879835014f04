"""The cost of steering, as ratios of measurements in one process: `python -m trl_steer.eval.benchmarks`."""
