"""Callbacks: advice from the training log, and the gradient noise scale."""
