"""The commands of `trl-steer alpaca-eval`."""
