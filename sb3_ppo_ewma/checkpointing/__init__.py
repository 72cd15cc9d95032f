"""What ``save()`` keeps: own state, rollouts between iterations, generators of random numbers."""
