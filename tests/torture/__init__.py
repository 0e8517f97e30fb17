"""Attacks on a federation of real processes: killed, frozen, cut off and misled at named points, by seeded plans.

python -m tests.torture --seed 17            one plan, told step by step
python -m tests.torture --plans 300          every point and disturbance once, then 300 random plans

points        where a process can be hit: a table of functions of the real programs, and of places on the wire
passages      what counts the passages inside a process, and hits it; loaded by `startup/sitecustomize.py`
wire          a relay between agents and service that cuts and stalls
postgres      a database of its own that is restarted, and whose clock can jump
ground        the processes: service or servers and coordinators, three agents, everybody's keys
plans         what is done where: drawn from a seed
driver        carries a plan out, and waits until the job has ended
invariants    what must hold in database, blobs and journals afterwards
"""
