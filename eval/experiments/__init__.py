"""Small experiments, whose results are in `eval/results`."""
