"""`trl-steer lm-eval`: lm-evaluation-harness with our PEFT types registered, where `.pth` files do not run."""
