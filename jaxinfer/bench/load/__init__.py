"""Load from outside: clients of any server, what they saw, and a page that shows it."""
