"""Calibration text in a model's own words: beginnings of texts, and what the model makes of them."""
