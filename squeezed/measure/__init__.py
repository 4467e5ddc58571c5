"""Accuracy and speed, measured, and what a run says about itself."""
