"""Measured facts and proven bounds, each a report; a bound never stands without its assumptions."""
