"""Models of other libraries as policies, and what the pack asks of any decoder."""
