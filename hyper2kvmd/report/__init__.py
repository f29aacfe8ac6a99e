"""The report of a job: what it holds, and how people see it."""
