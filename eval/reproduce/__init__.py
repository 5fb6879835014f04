"""Studies: runs compared with one another."""
