"""AlpacaEval 2.0: generates and judges outputs, and writes reports and submissions, with the package `alpaca-eval`."""
