"""How fast the algorithms are beside PPO of Stable-Baselines3 and others: measurement and report."""
