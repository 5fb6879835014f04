"""AlpacaEval 2.0: generation, judging, report and submission around the package `alpaca-eval`."""
