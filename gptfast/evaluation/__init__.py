"""How well a model predicts: held-out sequences while it trains, whole texts, and choices between endings."""
