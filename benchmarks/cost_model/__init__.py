"""Closed-form FLOPs and bytes of the operators and of a training step, and thop rules that confirm them."""
