"""Faults on purpose: kill, corrupt, fill the disk, give nonsense; is anything lost, or does it pass unseen?"""
