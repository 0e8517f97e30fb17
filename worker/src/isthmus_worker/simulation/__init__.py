"""A federation on one machine: the job, the training code and the aggregation of a real one, without a network.

`isthmus simulate` is the command; `isthmus_worker.simulation.engine.simulate` is the function behind it.
"""
