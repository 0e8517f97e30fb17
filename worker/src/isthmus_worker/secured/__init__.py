"""A worker's side of secure aggregation: sessions, what is kept of them, and the rules by which it leaves a round.

`records` and `peers` are tables of the journal, `checks` holds the rules that need them, `session` goes through the
steps of one attempt in a thread of its own, `rounds` is what the main thread sees of all sessions, and `masking` is the
child's part. Only that one knows arrays.
"""
