"""Tests of the whole worker in a simulation: its threads, its clock, its queue and both services."""
