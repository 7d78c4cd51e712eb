"""Lower bounds on time from the data sheet: each operator and the training step."""
