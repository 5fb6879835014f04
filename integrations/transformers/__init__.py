"""Export to plain transformers checkpoints, which load without this package."""
