"""Evaluation of trained models: perplexity of texts and multiple-choice accuracy."""
