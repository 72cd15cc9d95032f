"""Several processes: data-parallel training and asynchronous collection."""
