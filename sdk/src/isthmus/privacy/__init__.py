"""The mathematics that protects records, on whichever side it runs: clipping and noise. No I/O, no clock."""
