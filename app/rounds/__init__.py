"""The round engine: rounds open, tasks are offered and held, updates admitted and accepted, sets frozen and summed.

    opening      which round comes next, and whom it asks
    offers       claim, heartbeat, refuse, fail: the life of a task before its upload
    uploads      admission from the headers, acceptance once the bytes are durable
    closing      what is due, and the freeze
    ending       the ends of rounds and jobs before their time, and what is forgotten with a round
    aggregation  the next model from the frozen set, off the event loop
    secured      the same under secure aggregation, as far as it differs

Lock order everywhere: job, round, task, participation, ledger; an event stream comes last.
"""
