"""What is claimed about speed and memory, as commands: each prints a table and writes the same as JSON.

These are measurements, not tests: nothing here passes or fails. `README.md` says what each command measures.
"""
