"""Runs a script up to its first training step, and writes down what it is about to train."""
