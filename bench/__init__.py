"""Measurements, apart from the test suite: speed is compared within one run, never against a number from elsewhere."""
