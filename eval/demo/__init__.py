"""`trl-steer demo`: train an adapter on a small real model, score it with lm-eval, say what came out."""
