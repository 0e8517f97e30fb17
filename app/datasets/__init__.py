"""Datasets as metadata: announced by workers, confirmed and opened for use by stewards."""
