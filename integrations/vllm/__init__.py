"""A plugin by which vLLM serves our adapter folders, and the command that starts its server with the right options."""
