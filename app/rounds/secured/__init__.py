"""Rounds under secure aggregation, as far as they differ from others: an attempt with a roster, and its steps.

    opening    who is in the roster of an attempt
    queries    an attempt, a member, and what decides about them, read under the locks of the house
    steps      messages that come in, and what their senders get
    closing    what is due: steps close, the set is frozen, an attempt is given up
    again      a new attempt: whom it asks
    giving_up  what is told of an attempt that is given up
    spending   shares of noise are spent for when unmasking opens
    unmasking  the sum of what is masked, off the event loop
    views      where an attempt stands, as people see it

An attempt and its members change under the lock of their round alone; they are locked after the task.
"""
