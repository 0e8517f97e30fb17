"""The round engine: rounds open, tasks are offered and held, updates admitted and accepted, sets frozen and summed.

    opening      which round comes next, and whom it asks
    offers       claim, heartbeat, refuse, fail: the life of a task before its upload
    uploads      admission from the headers, acceptance once the bytes are durable
    closing      what is due, the freeze, and the ends of rounds and jobs
    aggregation  the next model from the frozen set, off the event loop

Lock order everywhere: job, round, task, participation, ledger; an event stream comes last.
"""
