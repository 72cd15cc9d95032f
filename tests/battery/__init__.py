"""
What Stable-Baselines3 checks of PPO, for every algorithm of ``algorithms.py``: a new algorithm is one line there.

``BATTERY_CONTROL=1`` adds SB3's own PPO to the list, to tell a mistake of the battery from one of an algorithm.
"""
