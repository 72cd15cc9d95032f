"""EnvPool's tasks as Gymnasium environments and as vectorised environments of Stable-Baselines3."""
