"""The mathematics of a round that anyone can replay: cohorts, sums, strategies, statistics, metrics. It does no I/O."""
