"""The schema's history: one head, each step in a transaction of its own, applied by `isthmus-server migrate`."""
