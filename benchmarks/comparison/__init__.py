"""PPO, PPO-EWMA, PPG and PPG-EWMA side by side."""
