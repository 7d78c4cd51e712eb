"""Training of a GPT: config, step, loop and checkpoints, on one or several devices."""
