"""Training a GPT: settings, the step, the loop, checkpoints, several processes."""
