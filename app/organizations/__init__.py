"""Data holders, and the rows that all who hold keys have in common: principals, API keys, enrolment tokens."""
