"""EnvPool's tasks as environments of Gymnasium and Stable-Baselines3."""
