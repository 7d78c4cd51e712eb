"""Evaluation of trained models: perplexity of a text and multiple-choice accuracy."""
