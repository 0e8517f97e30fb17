"""Participations and their grants: asked for by a job, decided by a dataset's steward or policy, taken back at any moment."""
