"""Agents at organizations: how they enrol and how they end."""
