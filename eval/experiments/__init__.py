"""Experiments that are small enough to repeat at any time; their results are committed under `eval/results`."""
