"""`trl-steer export`: writes adapters in the formats of other programs."""
