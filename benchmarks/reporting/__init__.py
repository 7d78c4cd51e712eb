"""Reads results files and draws, tabulates and compares what they hold."""
