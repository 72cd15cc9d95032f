"""Experiments; the package never imports them. Run them from the root of the repository."""
