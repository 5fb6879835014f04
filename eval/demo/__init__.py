"""`trl-steer demo`: trains an adapter on a small model, evaluates it with lm-eval, and reports the result."""
