"""Closed forms for how networks learn, and the measurements to hold against them."""
