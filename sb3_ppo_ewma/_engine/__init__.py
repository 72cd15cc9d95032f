"""The training step: its definition, and faster ways to make it."""
