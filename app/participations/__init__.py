"""Participations and their grants: asked for by a job, decided by a steward or a policy, taken back at any moment."""
