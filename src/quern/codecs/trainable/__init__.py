"""Stored weights as numbers that can be trained, by kind of codec."""
