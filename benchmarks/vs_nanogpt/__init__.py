"""Training races against nanoGPT scripts, and learning curves."""
