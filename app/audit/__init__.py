"""Events: what happened, appended in the same transaction as the change."""
